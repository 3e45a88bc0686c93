"""What tests of fetch_model share: the stage into a folder of theirs, and changes to a model."""

import json
from pathlib import Path

from stages.fetch_model.__main__ import Model, fetch
from stages.fetch_model.checkpoint import INDEX, install
from stages.shared.core import files
from tests import hub as hubs


def fetched(model: Model, out: Path) -> tuple[Path, Path]:
    """What the stage does, into another folder than `models`."""
    base, tokenizer, scratch = out / "base", out / "tokenizer", out / "scratch"
    for folder in (base, tokenizer, scratch):
        folder.mkdir(parents=True)
    install(fetch(model, scratch), base, tokenizer)
    return base, tokenizer


def from_path(folder: Path, revision: str | None = None) -> Model:
    revision = revision or files.folder_sha256(folder)
    return Model(source="path", name=str(folder), revision=revision, file=None, sha256=None)


def from_hub(revision: str | None = hubs.COMMIT) -> Model:
    return Model(source="hub", name="me/tiny", revision=revision, file=None, sha256=None)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def shard(folder: Path, weight_map: dict[str, object]) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
