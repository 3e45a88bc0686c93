"""Parameters of `plan`, owned by other stages."""

from typing import Literal

from stages.shared.core.params import BorrowedSection, Section
from stages.shared.step.config import Lora, Train
from stages.shared.step.memory import DensePrecision, Precision


class Quantize(BorrowedSection):
    """Keys of `quantize` that memory depends on."""

    precision: Precision
    double_quant: bool
    compute_dtype: DensePrecision


class Plan(Section):
    """No keys yet."""


class Params(Section):
    """The sections that `plan` declares in dvc.yaml."""

    quantize: Quantize
    lora: Lora
    train: Train
    plan: Plan


Tried = Literal["quantize", "lora", "train"]  # by `--set`
