"""Raw conversations as JSON Lines, from a file, a folder or a data set on the hub.

Reads:  data.path (a file or a folder), or data.repo at data.revision
Writes: data/raw/train.jsonl; data/raw/eval.jsonl if the source has a held-out split;
        data/raw/source.json, the source files with their SHA-256
Run:    python -m stages.fetch_data
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.shared.core import files, params
from stages.shared.core.command import run
from stages.shared.core.params import BorrowedSection, Section

RAW = Path("data/raw")


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


def main() -> None:
    """Read parameters, fetch."""
    from stages.fetch_data.sources import fetch  # noqa: PLC0415  (all stages read `Params`)

    settings = params.load(Params, "fetch_data")
    with files.whole_folder(RAW) as raw:
        fetch(settings.data, raw, settings.prepare.max_row_bytes)


if __name__ == "__main__":
    run(main)
