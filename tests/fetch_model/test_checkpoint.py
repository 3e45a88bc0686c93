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
from tests import tiny, vocabularies
from tests.fetch_model.helpers import SHARDS, change, fetched, from_hub, from_path, refused, shard

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"


def test_model_is_loadable_by_itself(mine: Path, tmp_path: Path) -> None:
    base, tokenizer = fetched(from_path(mine), tmp_path / "out")
    assert {p.name for p in base.iterdir()} == {CONFIG, GENERATION, WEIGHTS}
    assert files.sha256(base / WEIGHTS) == files.sha256(mine / WEIGHTS)
    assert (base / WEIGHTS).stat().st_ino != (mine / WEIGHTS).stat().st_ino
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    alone = AutoTokenizer.from_pretrained(tokenizer)
    assert alone.encode("zwei und zwei") == tiny.tokenizer().encode("zwei und zwei")
    assert alone.eos_token == "<|im_end|>"


@pytest.mark.parametrize("from_a_hub", [False, True])
def test_named_templates_and_all_end_tokens_are_kept(
    from_a_hub: bool, mine: Path, hub: hubs.Hub, tmp_path: Path
) -> None:
    (mine / "additional_chat_templates").mkdir()
    (mine / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    change(mine, GENERATION, eos_token_id=[0, 2])
    base, tokenizer = fetched(from_hub(hub, mine) if from_a_hub else from_path(mine), tmp_path)
    assert AutoTokenizer.from_pretrained(tokenizer).chat_template["rag"] == "{{ messages }}"
    assert json.loads((base / "config.json").read_text())["eos_token_id"] == [2, 0]


def test_index_is_made_of_the_shards(mine: Path, tmp_path: Path) -> None:
    tensors = load_file(mine / WEIGHTS)
    shard(mine, **{"model.none.weight": SHARDS[0]})
    model = from_path(mine)
    (mine / "other.safetensors").write_bytes(b"not in the index")
    base, _ = fetched(model, tmp_path / "out")
    assert {p.name for p in base.iterdir()} == {CONFIG, GENERATION, INDEX, SHARDS[0]}
    index = json.loads((base / INDEX).read_text())
    assert list(index["weight_map"]) == sorted(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    (mine / "other.safetensors").unlink()
    save_file({"model.norm.weight": torch.zeros(1)}, mine / SHARDS[1])
    weight_map = {"model.embed_tokens.weight": SHARDS[0], "x": SHARDS[1]}
    (mine / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(from_path(mine), r"holds model\.norm\.weight as model-00001", tmp_path / "twice")


def test_settings_and_code_of_another_machine_are_dropped(mine: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"attn_implementation": "flash_attention_3", "use_cache": False}
    keys |= {"_attn_implementation": "sdpa", "output_attentions": True, "torchscript": True}
    keys |= {"distributed_config": {"enable_expert_parallel": True}, "tp_plan": "auto"}
    keys |= {"_name_or_path": "/home/me", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    change(mine, CONFIG, **keys, output_router_logits=True, text_config={**keys, "kept": 1})
    change(mine, GENERATION, **keys, compile_config={}, temperature=0.5)
    change(mine, "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    model = from_path(mine)
    (mine / "code.py").write_text("raise SystemExit('run')")
    base, tokenizer = fetched(model, tmp_path / "out")
    config, generation = (json.loads((base / name).read_text()) for name in (CONFIG, GENERATION))
    assert not {*keys, "compile_config"} & {*config, *generation}
    assert (config["text_config"], generation["temperature"]) == ({"kept": 1}, 0.5)
    assert config["output_router_logits"]  # asks for the load-balancing loss
    assert "auto_map" not in (tokenizer / "tokenizer_config.json").read_text()
    assert not [*base.glob("*.py"), *tokenizer.glob("*.py")]


def test_install_keeps_spaces_after_control_tokens(mine: Path, tmp_path: Path) -> None:
    """Transformers drops `legacy` as it saves a LlamaTokenizer."""
    vocabularies.llama2().save_pretrained(mine)
    change(mine, "tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=True)
    _, tokenizer = fetched(from_path(mine), tmp_path / "out")
    original, alone = map(AutoTokenizer.from_pretrained, (mine, tokenizer))
    assert alone.encode("<s>two</s>four") == original.encode("<s>two</s>four")


OUTSIDE = ["../outside.safetensors", "/etc/outside.safetensors", "a\\..\\outside.safetensors"]


@pytest.mark.parametrize("file", [*OUTSIDE, "pytorch_model.bin", 7, [], SHARDS[1]])
def test_index_must_name_files_beside_it(
    file: object, mine: Path, hub: hubs.Hub, tmp_path: Path
) -> None:
    (tmp_path / "outside.safetensors").write_bytes((mine / WEIGHTS).read_bytes())
    shard(mine, **{"model.embed_tokens.weight": file})
    reason = r"puts model\.embed_tokens\.weight into .*beside the index"
    refused(from_path(mine), reason, tmp_path / "path")
    refused(from_hub(hub, mine), reason, tmp_path / "hub")
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_pickles_are_refused(mine: Path, hub: hubs.Hub, tmp_path: Path) -> None:
    (mine / WEIGHTS).rename(mine / "pytorch_model.bin")
    refused(from_path(mine), r"only pytorch_model\.bin, a pickle", tmp_path / "path")
    refused(from_hub(hub, mine), r"only pytorch_model\.bin, a pickle", tmp_path / "hub")


PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
TEMPLATE: dict[str, Any] = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
TEMPLATE["single"] = [{"SpecialToken": {"id": "x", "type_id": 0}}]
PANIC = r"tokenizer.*cannot be read \(PanicException"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (CONFIG, {"model_type": "mine", "auto_map": {"AutoModel": "a.B"}}, "run code of its own"),
        (CONFIG, {"model_type": "bert"}, "bert is an encoder, which sees"),
        (CONFIG, {"model_type": "vit"}, "model_type is 'vit'; expected a causal"),
        (CONFIG, {"model_type": ["llama"]}, r"model_type is \['llama'\]; expected a causal"),
        (CONFIG, {"dtype": "auto"}, r"mine/config\.json: cannot be read"),
        (
            CONFIG,
            {"model_type": "mixtral", "num_experts_per_tok": 9},
            "is 9, more than num_local_e",
        ),
        (CONFIG, {"num_key_value_heads": 3}, "is 3, no divisor of num_attention_heads, 4"),
        (CONFIG, {"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
        ("tokenizer_config.json", {"eos_token": None}, "has no eos_token"),
        # No `Exception`, and it writes to the terminal before it is raised.
        ("tokenizer.json", {"normalizer": PRECOMPILED}, PANIC),
        ("tokenizer.json", {"post_processor": TEMPLATE}, PANIC),
        (WEIGHTS, b"\x08" + bytes(7) + b"{}", r"mine/model\.safetensors: cannot be read"),
        ("tokenizer.json", None, "its tokenizer: cannot be read"),
        ("token*", None, r"has no tokenizer\. Put"),
        (CONFIG, b"{", r"mine/config\.json: cannot be read \(JSONDecodeError"),
        (CONFIG, b"[]", "list instead of an object"),
        (CONFIG, None, r"has no config\.json"),
    ],
)
def test_model_that_cannot_be_tuned_is_refused(
    name: str, changes: Any, reason: str, mine: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (mine / "chat_template.jinja").unlink(missing_ok=True)
    if isinstance(changes, dict):
        change(mine, name, **changes)
    for path in [] if isinstance(changes, dict) else mine.glob(name):
        path.unlink() if changes is None else path.write_bytes(changes)
    refused(from_path(mine), reason, tmp_path / "out")
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("beyond", [1023, 1024, 2**31])
def test_token_ids_are_bounded_by_the_embedding(beyond: int, mine: Path, tmp_path: Path) -> None:
    size = json.loads((mine / CONFIG).read_text())["vocab_size"]
    tokenizer = json.loads((mine / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[max(vocabulary, key=lambda token: vocabulary[token])] = size + beyond
    (mine / "tokenizer.json").write_text(json.dumps(tokenizer))
    if beyond < 1024:
        fetched(from_path(mine), tmp_path / "out")
    else:
        reason = f"has the token id {size + beyond}, its config.json a vocabulary of {size}"
        refused(from_path(mine), reason, tmp_path / "out")
