"""Parameters of `plan`, owned by other stages."""

from typing import Literal

from stages.shared.core.params import BorrowedSection, Section
from stages.shared.step.config import Lora, Train


class Quantize(BorrowedSection):
    """Precision of the linear layers."""

    precision: Literal["fp32", "bf16", "fp16", "int8", "fp4", "nf4"]
    double_quant: bool
    compute_dtype: Literal["bf16", "fp16", "fp32"]


class Plan(Section):
    """No keys yet."""


class Params(Section):
    """The sections that `plan` declares in dvc.yaml."""

    quantize: Quantize
    lora: Lora
    train: Train
    plan: Plan


Tried = Literal["quantize", "lora", "train"]  # by `--set`
