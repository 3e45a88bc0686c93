"""Trained base weights, refused adapters, and variants that are resumed."""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from stages.shared.core import bounds, files, machine
from stages.shared.core.errors import UserError
from stages.shared.model import loading
from stages.shared.step import adapter
from stages.shared.weights import precision
from stages.shared.weights.precision import autocast
from stages.train.checkpoints import claim
from stages.train.devices import train
from tests import tiny
from tests.architectures import BESIDES, saved
from tests.shared.step.adapters import CPU, IDS, biased, load, logits
from tests.train.running import settings


def test_trained_biases_stay_fp32_through_a_forward_pass(tmp_path: Path) -> None:
    """Bitsandbytes rounds a bias to its compute dtype in place, a norm takes one dtype only."""
    model = load(biased(tmp_path), bias="all")
    biases = {n: p for n, p in model.named_parameters() if n.endswith(".bias")}
    assert len(biases) == 2 * (4 + 2 + 2) + 1
    for bias in biases.values():
        bias.data += 2.0**-14  # too fine for bf16
    before = {name: bias.detach().clone() for name, bias in biases.items()}
    with autocast(CPU, torch.bfloat16):
        loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    after = dict(model.named_parameters())
    for name, bias in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], bias), name
        assert after[name].grad is not None and after[name].grad.any(), name


@pytest.mark.parametrize("has_bf16", [True, False])
def test_evaluation_computes_with_the_saved_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    """On a CPU without bf16 matmuls too, where the values of a bf16 file are computed in fp32."""
    monkeypatch.setattr(precision, "has_bf16_matmuls", lambda kind: has_bf16)
    dtype = torch.bfloat16 if has_bf16 else torch.float32
    model = load(biased(tmp_path), bias="all", modules_to_save=["lm_head", "embed_tokens"])
    own = adapter.base_weights(model)
    for weight in own:
        weight.data += 2.0**-14
    before = [weight.detach().clone() for weight in own]
    with adapter.as_saved(model, torch.bfloat16, dtype):
        scored = logits(model, dtype)
        adapter.save(model, tmp_path / "adapter", torch.bfloat16)
    assert all(w.dtype == torch.float32 for w in own)
    assert all(torch.equal(w, b) for w, b in zip(own, before, strict=True))
    loaded = loading.load_adapted(tmp_path / "adapter", tmp_path / "nf4", CPU)
    assert torch.equal(logits(loaded, dtype), scored)


@pytest.mark.parametrize(
    ("saved", "tied", "copies"),
    [
        (["lm_head"], True, 1),
        (["embed_tokens"], True, 1),
        (["lm_head", "embed_tokens"], True, 1),
        (["lm_head", "embed_tokens"], False, 2),
    ],
)
def test_tied_weights_trained_at_both_ends_stay_tied(
    tmp_path: Path, saved: list[str], tied: bool, copies: int
) -> None:
    config = tiny.model().config
    config.tie_word_embeddings = tied
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = load(tmp_path, modules_to_save=saved)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert [tuple(p.shape) for p in trained] == [(384, 64)] * copies
    assert all(p.dtype == torch.float32 for p in trained)


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"precision": "bf16", "init": "loftq"}, "init: loftq needs quantized weights"),
        ({"init": "pissa", "r": 40}, "init: model.layers.0.self_attn.k_proj (Linear4bit) has no"),
        ({"init": "olora", "target_modules": ["embed_tokens"]}, "init: model.embed_tokens (Emb"),
        ({"precision": "int8", "dora": True}, "dora: on a CPU, peft loses the scales"),
        ({"modules_to_save": ["q_proj"]}, "modules_to_save: 'q_proj' takes in"),
        ({"modules_to_save": ["mlp"]}, "modules_to_save: 'mlp' takes in"),
        (
            {"precision": "bf16", "target_modules": ["lm_head"], "modules_to_save": ["layers"]},
            "modules_to_save: ['layers'] takes in a list of modules",
        ),
        (
            {"modules_to_save": ["lm_head", "hed"]},
            "modules_to_save: this model has no module 'hed'",
        ),
        ({"target_modules": ["q_proj", "typo"]}, "target_modules: this model has no module 'typo'"),
        (
            {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
            "target_modules: 'lm_head' is in lora.modules_to_save too",
        ),
        ({"bias": "all"}, "bias: there is no bias in this model"),
        ({"bias": "lora_only"}, "bias: there is no bias in the layers"),
        ({"target_modules": ".*"}, "target_modules: '.*' does not fit this model"),
    ],
)
def test_impossible_adapter_is_refused_in_one_line(
    tmp_path: Path, lora: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=f"^lora.{re.escape(expected)}") as error:
        load(tmp_path, **lora)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < (340 if lora == {"target_modules": ".*"} else 161)


def test_embedding_that_peft_cannot_adapt_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path, "opt", BESIDES["opt"])
    lora = settings(lora__target_modules=["embed_positions"]).lora
    with pytest.raises(UserError, match=r"embed_positions is a OPT.*, which peft cannot adapt"):
        adapter.load_for_lora(base, lora, CPU)


def test_pattern_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "limited", partial(bounds.limited, 0.1))
    with pytest.raises(UserError, match=r"^lora.target_modules: '\(\.\*\)\*x' takes more than 0.1"):
        load(tmp_path, target_modules="(.*)*x")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("target_modules", "", "all-linear"),
        ("target_modules", [], "all-linear"),
        ("target_modules", "(q_proj", "all-linear"),
        ("target_modules", ["lm_head", ""], "names that are not empty"),
        ("modules_to_save", ["lm_head", ""], "names that are not empty"),
    ],
)
def test_modules_that_match_nothing_are_refused_at_once(
    key: str, value: Any, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        settings(**{f"lora__{key}": value})


@pytest.mark.parametrize(
    "lora",
    [
        {"lora__init": "pissa", "lora__dora": True},
        {"lora__bias": "all", "lora__modules_to_save": ["lm_head", "embed_tokens"]},
        {"lora__modules_to_save": ["embed_tokens"]},  # an fp32 one, before norms in bf16
    ],
)
def test_resumed_variant_ends_in_the_same_bytes(
    tmp_path: Path, lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CHECKPOINT_STEPS", "2")
    machine.machine.cache_clear()
    data = tiny.prepared(tmp_path / "prepared")
    inputs = {"train": data / "train.parquet", "eval": data / "eval.parquet"}
    inputs["model"] = biased(tmp_path) / "nf4"
    wanted = settings(train__epochs=1, **lora)
    with claim(tmp_path, "a-training", keep=9) as checkpoints:
        train(wanted, inputs, checkpoints)
        whole = files.folder_sha256(checkpoints.best)
        for later in sorted(checkpoints.folder.glob("step-*"))[1:]:
            shutil.rmtree(later)
        outcome = train(wanted, inputs, checkpoints)
        assert outcome.metrics["resumed_from_step"] == 2
        assert files.folder_sha256(checkpoints.best) == whole
    machine.machine.cache_clear()
