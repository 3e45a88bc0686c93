"""A checkpoint: whole, of a kind that can be tuned, and with nothing that could run."""

import json
from pathlib import Path

import pytest

from stages.fetch_model.checkpoint import INDEX
from stages.shared.core.errors import UserError
from tests import hub as hubs
from tests.fetch_model.helpers import change_config, fetched, from_hub, from_path, shard


def test_shards_are_taken_by_their_index(mine: Path, tmp_path: Path) -> None:
    shard(mine, {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"})
    (mine / "other.safetensors").write_bytes(b"not asked for")
    base, _ = fetched(from_path(mine), tmp_path / "out")
    assert sorted(p.name for p in base.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        INDEX,
    ]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../outside.safetensors", "beside the index"),
        ("/etc/outside.safetensors", "beside the index"),
        ("a\\..\\outside.safetensors", "beside the index"),
        ("pytorch_model.bin", "beside the index"),
        (7, "beside the index"),
        ("model-00002-of-00002.safetensors", "which is not there"),
    ],
)
def test_a_hostile_index_is_refused(
    file: object, reason: str, mine: Path, hub: hubs.Hub, tmp_path: Path
) -> None:
    (tmp_path / "outside.safetensors").write_bytes((mine / "model.safetensors").read_bytes())
    shard(mine, {"model.embed_tokens.weight": file})
    with pytest.raises(UserError, match=rf"puts model\.embed_tokens\.weight into .*{reason}"):
        fetched(from_path(mine), tmp_path / "path")
    hub.repositories["me/tiny"] = {p.name: p.read_bytes() for p in mine.iterdir()}
    with pytest.raises(UserError, match=reason):
        fetched(from_hub(), tmp_path / "hub")
    assert not any(request.endswith(".safetensors") for request in hub.requests)


def test_pickles_are_refused(mine: Path, hub: hubs.Hub, tmp_path: Path) -> None:
    (mine / "model.safetensors").rename(mine / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, a pickle"):
        fetched(from_path(mine), tmp_path / "path")
    hub.repositories["me/tiny"] = {p.name: p.read_bytes() for p in mine.iterdir()}
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, a pickle"):
        fetched(from_hub(), tmp_path / "hub")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mine", "auto_map": {"AutoModel": "a.B"}}, r"run code of its own \(auto_m"),
        ({"model_type": "vit"}, "model_type is 'vit'; expected a causal"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    ],
)
def test_a_model_that_cannot_be_tuned_is_refused(
    changes: dict[str, object], reason: str, mine: Path, tmp_path: Path
) -> None:
    change_config(mine, **changes)
    with pytest.raises(UserError, match=reason):
        fetched(from_path(mine), tmp_path / "out")


def test_code_that_is_not_needed_is_left_out(mine: Path, tmp_path: Path) -> None:
    change_config(mine, auto_map={"AutoModelForCausalLM": "code.Model"})
    (mine / "code.py").write_text("raise SystemExit('run')")
    base, _ = fetched(from_path(mine), tmp_path / "out")
    assert "auto_map" not in json.loads((base / "config.json").read_text())
    assert not (base / "code.py").exists()


def test_what_is_missing_or_damaged_is_refused(mine: Path, saved: Path, tmp_path: Path) -> None:
    def refused(reason: str, attempt: str) -> None:
        with pytest.raises(UserError, match=reason):
            fetched(from_path(mine), tmp_path / attempt)

    weights = (saved / "model.safetensors").read_bytes()
    (mine / "model.safetensors").write_bytes(weights[:-100])
    refused(r"mine/model\.safetensors: is not whole", "cut")
    (mine / "model.safetensors").write_bytes(weights)
    (mine / "tokenizer.json").unlink()
    refused("has no tokenizer that transformers can load", "tokenizer.json")
    (mine / "tokenizer_config.json").unlink()
    refused("has no tokenizer; expected", "tokenizer")
    (mine / "config.json").write_text("{")
    refused(r"config\.json: is not JSON", "json")
    (mine / "config.json").unlink()
    refused(r"has no config\.json", "config")
