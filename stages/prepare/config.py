"""The parameters of the preparation."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from stages.shared.core.params import Section

TrainOn = Literal["assistant", "last", "all"]
Thinking = Literal["keep", "last", "drop"]
Flat = Literal["instruction", "input", "output", "prompt", "completion", "history", "reasoning"]
Column = Flat | Literal["messages", "text", "system", "tools", "answer", "language"]


class Prepare(Section):
    """`prepare`: row form, sources, template, supervision, limits and split."""

    format: Literal["auto", "guanaco", "messages", "alpaca", "oasst", "oasst_all", "text"]
    columns: dict[Column, str] | None  # field: the row's column
    mix: dict[str, Annotated[float, Field(ge=0)]] | None
    template: Literal["guanaco", "llama2", "chatml", "tokenizer"]
    template_name: str | None
    train_on: TrainOn
    thinking: Thinking
    system: Literal["merge"] | None
    max_length: Annotated[int, Field(ge=2, le=1 << 20)]  # tokens
    max_row_bytes: Annotated[int, Field(ge=1000, le=10**8)]
    max_rows: Annotated[int, Field(ge=1, le=10**9)] | None
    max_rejected: Annotated[float, Field(ge=0, le=1)]
    eval_fraction: Annotated[float, Field(gt=0, lt=1)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]

    @field_validator("columns")
    @classmethod
    def _each_once(cls, value: dict[Column, str] | None) -> dict[Column, str] | None:
        if value and len({*value.values()}) < len(value):
            raise ValueError("each column under one name")
        return value

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # a mapping has none


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    prepare: Prepare
