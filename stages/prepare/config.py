"""The parameters of the preparation."""

from typing import Annotated, Literal

from pydantic import Field

from stages.shared.core.params import Section


class Prepare(Section):
    """`prepare`: row format, template, supervision, limits and split."""

    format: Literal["auto", "guanaco", "messages", "alpaca"]
    template: Literal["guanaco", "llama2", "chatml", "tokenizer"]
    train_on: Literal["assistant", "last", "all"]
    max_length: Annotated[int, Field(ge=2, le=1 << 20)]  # tokens
    max_row_bytes: Annotated[int, Field(ge=1000, le=10**8)]
    max_rows: Annotated[int, Field(ge=1, le=10**9)] | None
    max_rejected: Annotated[float, Field(ge=0, le=1)]
    eval_fraction: Annotated[float, Field(gt=0, lt=1)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class Params(Section):
    """What dvc.yaml declares for `prepare`."""

    prepare: Prepare
