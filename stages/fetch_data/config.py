"""The section `data` of params.yaml."""

from typing import Literal

from pydantic import Field

from stages.shared.core.params import BorrowedSection, Section


class Data(Section):
    """`data`: source of the conversations."""

    source: Literal["file", "hub"]
    path: str
    repo: str
    config: str | None
    revision: str | None


class RowLimit(BorrowedSection):
    """Keys of `prepare` that `fetch_data` reads."""

    max_row_bytes: int = Field(ge=1000, le=10**8)


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    data: Data
    prepare: RowLimit
