"""The stage into a folder of the test's own, and changes to a model."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.fetch_model.__main__ import Model
from stages.fetch_model.checkpoint import INDEX
from stages.fetch_model.sources import fetch
from stages.shared.core import files
from stages.shared.core.errors import UserError
from tests import hub as hubs

SHARDS = ["model-00001-of-00001.safetensors", "model-00002-of-00002.safetensors"]


def fetched(model: Model, out: Path) -> tuple[Path, Path]:
    """Run the stage; the folders of the model and of the tokenizer."""
    base, tokenizer = out / "base", out / "tokenizer"
    base.mkdir(parents=True)
    tokenizer.mkdir()
    fetch(model, base, tokenizer)
    return base, tokenizer


def from_path(folder: Path, revision: str = "") -> Model:
    """The model of a folder that holds nothing else, pinned by its hash."""
    revision = revision or files.folder_sha256(folder)
    return Model(source="path", name=str(folder), revision=revision, file=None, sha256=None)


def from_hub(hub: hubs.Hub | None = None, folder: Path | None = None) -> Model:
    """The model of the hub, with the files of a folder where one is given."""
    if hub and folder:
        found = (path for path in folder.rglob("*") if path.is_file())
        hub.repositories["me/tiny"] = {
            p.relative_to(folder).as_posix(): p.read_bytes() for p in found
        }
    return Model(source="hub", name="me/tiny", revision=hubs.COMMIT, file=None, sha256=None)


def refused(model: Model, reason: str, out: Path) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        fetched(model, out)
    assert "\n" not in str(caught.value)


def change(folder: Path, name: str = "config.json", /, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    value = {**json.loads((folder / name).read_text()), **changes}
    (folder / name).write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def shard(folder: Path, **weight_map: object) -> None:
    """Make the weights one shard, by an index as some tools write it: without metadata."""
    (folder / "model.safetensors").rename(folder / SHARDS[0])
    weight_map = weight_map or {"model.embed_tokens.weight": SHARDS[0]}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
