"""The sections `lora` and `train` of params.yaml."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from stages.shared.core.params import Section

Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=10**8)]


class Lora(Section):
    """`lora`: the shape of the adapter."""

    r: Annotated[int, Field(ge=1, le=65_536)]
    alpha: Annotated[float, Field(gt=0, le=1e6)]
    dropout: Fraction
    target_modules: str | list[str]
    experts: bool | None
    modules_to_save: list[str] | None
    bias: Literal["none", "all", "lora_only"]
    init: Literal["default", "pissa", "olora", "loftq"]
    rslora: bool
    dora: bool

    @field_validator("target_modules", "modules_to_save")
    @classmethod
    def _no_empty_name(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and "" in value:
            raise ValueError("names that are not empty")
        return value

    @field_validator("target_modules")
    @classmethod
    def _names_or_a_pattern(cls, value: str | list[str]) -> str | list[str]:
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise ValueError(f"all-linear, a list of names, or a pattern ({error})") from None
        if not value:
            raise ValueError("all-linear, a pattern, or a list of names that is not empty")
        return value


class Train(Section):
    """`train`: method, length, optimizer and schedule."""

    method: Literal["lora", "full"]
    epochs: Annotated[int, Field(ge=1, le=10_000)]
    max_steps: Count | None
    batch_size: Annotated[int, Field(ge=1, le=65_536)]
    learning_rate: Annotated[float, Field(gt=0, le=10)]
    scheduler: Literal["cosine", "linear", "constant"]
    warmup: Fraction
    weight_decay: Annotated[float, Field(ge=0, le=10)]
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)]  # .inf: never clipped
    optimizer: Literal["adamw", "adamw_8bit"]
    router_aux_loss: Annotated[float, Field(ge=0)] | None
    eval_steps: Count | None
    patience: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)]  # as torch takes it
