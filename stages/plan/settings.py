"""The parameters that `plan` reads; most belong to other stages, which check the rest of them."""

from typing import Literal

from pydantic import Field

from stages.shared.core.params import BorrowedSection, Section
from stages.shared.memory import DensePrecision, Precision


class Quantize(BorrowedSection):
    """What of `quantize` is read."""

    precision: Precision
    double_quant: bool
    compute_dtype: DensePrecision


class Lora(BorrowedSection):
    """What of `lora` is read."""

    r: int = Field(ge=1)
    dropout: float
    target_modules: str | list[str]
    modules_to_save: list[str] | None
    bias: Literal["none", "all", "lora_only"]
    init: str
    dora: bool


class Train(BorrowedSection):
    """What of `train` is read."""

    method: Literal["lora", "full"]
    epochs: int = Field(ge=1)
    max_steps: int | None = Field(ge=1)
    batch_size: int = Field(ge=1)
    optimizer: Literal["adamw", "adamw_8bit"]


class Plan(Section):
    """Nothing to choose yet."""


class Params(Section):
    """The sections that `plan` declares."""

    quantize: Quantize
    lora: Lora
    train: Train
    plan: Plan
