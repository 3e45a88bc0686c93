"""The parameters that `plan` reads; other stages own them."""

from typing import Literal

from stages.shared.core.params import BorrowedSection, Section
from stages.shared.step.config import Lora, Train
from stages.shared.step.memory import DensePrecision, Precision


class Quantize(BorrowedSection):
    """The keys of `quantize` that memory depends on."""

    precision: Precision
    double_quant: bool
    compute_dtype: DensePrecision


class Plan(Section):
    """Nothing to choose yet."""


class Params(Section):
    """The sections that `plan` declares."""

    quantize: Quantize
    lora: Lora
    train: Train
    plan: Plan


Tried = Literal["quantize", "lora", "train"]  # sections that `--set` changes
