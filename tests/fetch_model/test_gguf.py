"""GGUF into safetensors: the same bytes each time, and no more lost than 4 bits lose."""

import json
import random
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from stages.fetch_model import sources
from stages.fetch_model.checkpoint import install
from stages.shared.core import files
from stages.shared.core.errors import UserError
from tests import tiny


def write_gguf(path: Path) -> None:
    """The tiny model as llama.cpp would have it, 4-bit (Q4_1) where the default model is."""
    model, tokens = tiny.model(), tiny.tokenizer()
    config, backend = model.config, json.loads(tokens.backend_tokenizer.to_str())
    vocabulary = sorted(tokens.get_vocab().items(), key=lambda item: item[1])
    special = set(tokens.all_special_ids)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": 10000.0,
        "vocab_size": config.vocab_size,
        "name": "A name that says where it comes from",
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": [token for token, _ in vocabulary],
        "token_types": [3 if number in special else 1 for _, number in vocabulary],
        "token_merges": [" ".join(pair) for pair in backend["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            kind = gguf.GGMLQuantizationType["Q4_1" if tensor.ndim == 2 else "F32"]
            stored = names.get_name(name, try_suffixes=(".weight",)) or name
            writer.add_tensor(stored, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_the_same_safetensors_each_time(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_gguf(tmp_path / "in/tiny.gguf")
    for run in ("first", "second"):
        base, tokenizer = tmp_path / run / "base", tmp_path / run / "tokenizer"
        base.mkdir(parents=True)
        converted = sources.to_safetensors(tmp_path / "in/tiny.gguf", tmp_path / f"{run}-scratch")
        install(converted, base, tokenizer, move=True)
    assert files.folder_sha256(tmp_path / "first") == files.folder_sha256(tmp_path / "second")
    with safe_open(base / "model.safetensors", framework="pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118  (it has no iterator)
        up = stored.get_tensor("model.layers.1.mlp.up_proj.weight")
    assert up.dtype == torch.bfloat16
    # Q4_1 has 16 levels over the range of 32 weights: half a step is what it loses at most.
    original = tiny.model().model.layers[1].mlp.up_proj.weight.detach()
    blocks = original.reshape(-1, 32)
    half_step = (blocks.amax(1) - blocks.amin(1)) / 30
    lost = (up.float() - original).abs().reshape(-1, 32).amax(1)
    assert (lost <= half_step * 1.05).all()
    alone = AutoTokenizer.from_pretrained(tokenizer)
    assert alone.decode(alone.encode("vier 二 +")) == "vier 二 +"
    assert (alone.bos_token_id, alone.eos_token_id, alone.pad_token_id) == (1, 2, 2)
    assert "A name" not in (base / "config.json").read_text()
    pieces = alone.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n42")
    assert [piece for piece, _ in pieces] == ["a", "ĊĊ", "4", "2"]  # as SmolLM2 learned its merges


@pytest.mark.parametrize("seed", range(6))
def test_damaged_gguf_ends_in_one_line(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    content, choose = bytearray(path.read_bytes()), random.Random(seed)
    if seed % 2:
        content = content[: choose.randrange(8, len(content) // 2)]
    for _ in range(0 if seed % 2 else 40):
        content[choose.randrange(8, 4000)] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^tiny\.gguf: cannot be read") as caught:
        sources.to_safetensors(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
