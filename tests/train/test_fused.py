"""The fused step computes what the library's own modules compute, and says where it does not.

On a GPU, with its kernels, where one is asked for: TEST_GPU=1 pytest.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from benchmarks.training_step import random_base
from stages.quantize.config import Quantize
from stages.quantize.convert import convert
from stages.shared.core import machine
from stages.shared.model import attention, packing, scoring
from stages.shared.model.packing import Example
from stages.shared.step import adapter
from stages.shared.step.fused import lora
from stages.shared.step.fused import patch as fused
from stages.shared.weights import precision
from stages.shared.weights.precision import autocast
from tests import tiny
from tests.train.running import run, settings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "initializer_range": 0.2,
}
KINDS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=32),
    "qwen2": Qwen2Config(**SHAPE),  # q, k and v have biases
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),  # queries and keys have norms
    "llama of two scales": LlamaConfig(  # of which the longest conversation of a row chooses
        **SHAPE,
        rope_parameters={
            "rope_type": "longrope",
            "attention_factor": 1.0,
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
    ),
}
LENGTHS = (40, 30, 9, 5)
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fused")
    return {kind: with_biases(random_base(config, root / kind)) for kind, config in KINDS.items()}


def with_biases(base: Path) -> Path:
    """A fresh model's are zero: whoever forgot them would not be seen."""
    weights = load_file(base / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(".bias"):
            tensor.normal_(std=0.5)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def quantized(base: Path, precision: Any, compute: Any) -> Path:
    folder = base.with_name(f"{base.name}-{precision}-{compute}")
    if not folder.exists():
        folder.mkdir()
        wanted = Quantize(precision=precision, double_quant=True, compute_dtype=compute)
        convert(base, folder, wanted, DEVICE)
    return folder


def adapted(folder: Path) -> PeftModel:
    """With factors that have moved: with B at zero, no gradient would reach A."""
    torch.manual_seed(1)
    model = adapter.load_for_lora(folder, settings().lora, DEVICE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


def batch(seed: int = 0) -> packing.Packed:
    random = np.random.default_rng(seed)
    return packing.pack(
        [
            Example(random.integers(3, 300, n), random.random(n) < 0.6, i)
            for i, n in enumerate(LENGTHS)
        ],
        DEVICE,
    )


def step(
    model: PeftModel, likelihoods: Any, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, Gradients]:
    model.zero_grad()
    with lora.cast_cache():  # as every step of a training is
        with autocast(DEVICE, dtype):
            losses = likelihoods.negative_log_likelihoods(model, batch(seed))
        losses.mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses.detach(), found


def distance(one: Gradients, other: Gradients) -> float:
    """Of all gradients together, relative, by Frobenius norm."""
    assert one.keys() == other.keys()
    apart = sum((one[n] - other[n]).square().sum() for n in other)
    return float((apart / sum(g.square().sum() for g in other.values())).sqrt())  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["nf4", "fp4", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_modules(
    bases: dict[str, Path], kind: str, precision: str
) -> None:
    folder = quantized(bases[kind], precision, "fp32")
    losses, gradients = step(adapted(folder), scoring, torch.float32)
    model = adapted(folder)
    fused.fuse(model)
    found, fused_gradients = step(model, fused, torch.float32)
    assert torch.allclose(found, losses, atol=2e-5)
    for name, gradient in gradients.items():
        apart = (fused_gradients[name] - gradient).norm() / gradient.norm()
        assert apart < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision_gradients_are_no_further_from_fp32_than_those_of_the_modules(
    bases: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16_matmuls", lambda kind: True)  # slowly, on some CPUs
    folder = quantized(bases[kind], "nf4", "bf16")
    exact = adapted(folder).float()
    for module in exact.modules():
        if hasattr(module, "quant_state") or hasattr(module, "compute_dtype"):
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    modules, model = adapted(folder), adapted(folder)
    fused.fuse(model)
    ours, theirs = 0.0, 0.0
    for seed in range(8):  # of one step alone, either may be a quarter nearer by chance
        _, truth = step(exact, scoring, torch.float32, seed)
        _, plain = step(modules, scoring, torch.bfloat16, seed)
        _, found = step(model, fused, torch.bfloat16, seed)
        ours += distance(found, truth) ** 2
        theirs += distance(plain, truth) ** 2
    assert 1e-4 < (theirs / 8) ** 0.5 < 0.1
    assert ours < 1.2 * theirs


def test_a_mask_is_made_only_where_a_conversation_is_longer_than_the_window(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above has one of 40 tokens, and Mistral's window here is 32."""
    model = adapted(quantized(bases["mistral"], "fp32", "fp32"))
    causal = model.get_base_model()
    assert fused._attention_mask(causal, batch()) is None
    with monkeypatch.context() as kernel:
        kernel.setattr(attention, "has_kernel", lambda *_: True)
        assert fused._attention_mask(causal, batch()) is not None
        kernel.setattr(causal.config, "attention_dropout", 0.1)  # the kernel is left out then
        assert fused._attention_mask(causal, batch()) is None
    causal.config.sliding_window = 40
    assert fused._attention_mask(causal, batch()) is not None
    model.set_attn_implementation("sdpa")
    assert fused._attention_mask(causal, batch()) is None


def test_without_gradients_the_modules_do_what_they_always_did(bases: dict[str, Path]) -> None:
    model = adapted(quantized(bases["llama"], "nf4", "bf16"))
    with torch.no_grad(), autocast(DEVICE, torch.bfloat16):
        before = scoring.supervised_logits(model, batch())
        fused.fuse(model)
        after = scoring.supervised_logits(model, batch())
    assert torch.equal(before, after)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepared(tmp_path_factory.mktemp("data") / "prepared")


@pytest.mark.parametrize(
    ("precision", "changes", "path"),
    [
        ("nf4", {}, "fused"),
        ("nf4", {"lora__dropout": 0.1}, "stock: lora.dropout is not 0"),
        ("nf4", {"lora__dora": True}, "stock: lora.dora is true"),
        ("nf4", {"lora__init": "pissa"}, "stock: lora.init is pissa or olora"),
        ("nf4", {"lora__modules_to_save": ["lm_head"]}, "stock: lora.modules_to_save are trained"),
        ("nf4", {"lora__target_modules": ["q_proj", "v_proj"]}, "stock: lora.target_modules leave"),
        (
            "nf4",
            {"lora__target_modules": r".*layers\.1\..*proj"},
            "stock: lora.target_modules leave",
        ),
        (
            "nf4",
            {"lora__target_modules": r".*(proj|lm_head)"},
            "stock: lora.target_modules take in the head",
        ),
        ("int8", {}, "stock: quantize.precision is int8"),
        ("bf16", {"train__method": "full"}, "stock: train.method is full"),
    ],
)
def test_what_is_not_covered_takes_the_modules_and_the_metrics_say_so(
    tmp_path: Path, data: Path, precision: str, changes: dict[str, Any], path: str
) -> None:
    metrics, _, _ = run(tmp_path, data, precision, train__max_steps=1, **changes)
    assert metrics["path"].startswith(path)


def test_the_fused_step_can_be_switched_off(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_FUSED", "false")
    machine.machine.cache_clear()
    metrics, _, _ = run(tmp_path, data, "nf4", train__max_steps=1)
    machine.machine.cache_clear()
    assert metrics["path"] == "stock: QLORA_FUSED is false"
