"""A checkpoint: whole, of a kind that can be tuned, in one form, with nothing that could run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.fetch_model.checkpoint import INDEX
from stages.shared.core import files
from tests import hub as hubs
from tests import tiny
from tests.fetch_model.helpers import change, fetched, from_hub, from_path, refused, shard


def test_a_model_is_loadable_by_itself(mine: Path, tmp_path: Path) -> None:
    change(mine, _name_or_path="/home/me/tiny")
    base, tokenizer = fetched(from_path(mine), tmp_path / "out")
    assert {p.name for p in base.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    weights = base / "model.safetensors"
    assert files.sha256(weights) == files.sha256(mine / "model.safetensors")
    assert weights.stat().st_ino != (mine / "model.safetensors").stat().st_ino
    assert "_name_or_path" not in json.loads((base / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    alone = AutoTokenizer.from_pretrained(tokenizer)
    assert alone.encode("zwei und zwei") == tiny.tokenizer().encode("zwei und zwei")
    assert alone.eos_token == "<|im_end|>"


def test_the_index_is_made_of_the_shards(mine: Path, tmp_path: Path) -> None:
    tensors = load_file(mine / "model.safetensors")
    shard(mine)
    (mine / "other.safetensors").write_bytes(b"not asked for")
    base, _ = fetched(from_path(mine), tmp_path / "out")
    assert sorted(p.name for p in base.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        INDEX,
    ]
    index = json.loads((base / INDEX).read_text())
    assert list(index["weight_map"]) == sorted(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_how_it_was_run_elsewhere_is_dropped(mine: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"attn_implementation": "flash_attention_3", "use_cache": False}
    keys |= {"_attn_implementation": "sdpa", "output_attentions": True, "torchscript": True}
    change(mine, "config.json", **keys, text_config={**keys, "kept": 1})
    change(mine, "generation_config.json", **keys, compile_config={}, temperature=0.5)
    base, _ = fetched(from_path(mine), tmp_path / "out")
    config = json.loads((base / "config.json").read_text())
    generation = json.loads((base / "generation_config.json").read_text())
    assert not set(keys) & {*config, *generation}
    assert (config["text_config"], generation["temperature"]) == ({"kept": 1}, 0.5)
    assert "compile_config" not in generation


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../outside.safetensors", "beside the index"),
        ("/etc/outside.safetensors", "beside the index"),
        ("a\\..\\outside.safetensors", "beside the index"),
        ("pytorch_model.bin", "beside the index"),
        (7, "beside the index"),
        ("model-00002-of-00002.safetensors", "beside the index"),
    ],
)
def test_a_hostile_index_is_refused(
    file: object, reason: str, mine: Path, hub: hubs.Hub, tmp_path: Path
) -> None:
    (tmp_path / "outside.safetensors").write_bytes((mine / "model.safetensors").read_bytes())
    shard(mine, {"model.embed_tokens.weight": file})
    reason = rf"puts model\.embed_tokens\.weight into .*{reason}"
    refused(from_path(mine), reason, tmp_path / "path")
    hub.repositories["me/tiny"] = {p.name: p.read_bytes() for p in mine.iterdir()}
    refused(from_hub(), reason, tmp_path / "hub")
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_an_index_that_is_not_of_its_shards_is_refused(mine: Path, tmp_path: Path) -> None:
    shard(mine, {"model.none.weight": "model-00001-of-00001.safetensors"})
    refused(from_path(mine), r"puts model\.none\.weight into .* which lacks it", tmp_path / "lacks")
    names = ["model-00001-of-00001.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"model.norm.weight": torch.zeros(1)}, mine / names[1])
    index = {"model.embed_tokens.weight": names[0], "x": names[1]}
    (mine / INDEX).write_text(json.dumps({"weight_map": index}))
    refused(from_path(mine), r"holds model\.norm\.weight as model-00001", tmp_path / "twice")


def test_pickles_are_refused(mine: Path, hub: hubs.Hub, tmp_path: Path) -> None:
    (mine / "model.safetensors").rename(mine / "pytorch_model.bin")
    refused(from_path(mine), r"only pytorch_model\.bin, a pickle", tmp_path / "path")
    hub.repositories["me/tiny"] = {p.name: p.read_bytes() for p in mine.iterdir()}
    refused(from_hub(), r"only pytorch_model\.bin, a pickle", tmp_path / "hub")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mine", "auto_map": {"AutoModel": "a.B"}}, r"run code of its own \(auto_m"),
        ({"model_type": "vit"}, "model_type is 'vit'; expected a causal"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; expected a causal"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    ],
)
def test_a_model_that_cannot_be_tuned_is_refused(
    changes: dict[str, Any], reason: str, mine: Path, tmp_path: Path
) -> None:
    change(mine, "config.json", **changes)
    refused(from_path(mine), reason, tmp_path / "out")


def test_code_is_left_out(mine: Path, tmp_path: Path) -> None:
    change(mine, auto_map={"AutoModelForCausalLM": "code.Model"})
    change(mine, "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    (mine / "code.py").write_text("raise SystemExit('run')")
    base, tokenizer = fetched(from_path(mine), tmp_path / "out")
    assert "auto_map" not in json.loads((base / "config.json").read_text())
    assert "auto_map" not in json.loads((tokenizer / "tokenizer_config.json").read_text())
    assert not [*base.glob("*.py"), *tokenizer.glob("*.py")]


def test_what_is_missing_or_damaged_is_refused(mine: Path, saved: Path, tmp_path: Path) -> None:
    weights = (saved / "model.safetensors").read_bytes()
    (mine / "model.safetensors").write_bytes(weights[:-100])
    refused(from_path(mine), r"mine/model\.safetensors: is not whole", tmp_path / "cut")
    (mine / "model.safetensors").write_bytes(weights)
    change(mine, "tokenizer_config.json", eos_token=None)
    refused(from_path(mine), "has no eos_token", tmp_path / "eos")
    (mine / "tokenizer.json").unlink()
    refused(from_path(mine), "has no tokenizer that transformers can load", tmp_path / "json")
    (mine / "tokenizer_config.json").unlink()
    (mine / "chat_template.jinja").unlink(missing_ok=True)
    refused(from_path(mine), r"has no tokenizer\. Put", tmp_path / "tokenizer")
    (mine / "config.json").write_text("{")
    refused(from_path(mine), r"config\.json: is not JSON", tmp_path / "config")
    (mine / "config.json").unlink()
    refused(from_path(mine), r"has no config\.json", tmp_path / "none")
