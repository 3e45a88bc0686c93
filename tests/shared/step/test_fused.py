"""The fused step against the modules of transformers and peft, and what it leaves to them.

On a GPU, with its kernels, where one is asked for: TEST_GPU=1 pytest.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from stages.quantize.convert import convert
from stages.shared.core import machine
from stages.shared.model import attention, packing, scoring
from stages.shared.model.packing import Example
from stages.shared.step.fused import lora, patch
from stages.shared.weights import bnb, precision
from stages.shared.weights.precision import autocast
from tests import tiny
from tests.architectures import SHAPE
from tests.shared.step.adapters import Gradients, distance, gradients_of, moved
from tests.train.running import run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LONGROPE = {  # two scales, of which the longest conversation of a row chooses
    "rope_type": "longrope",
    "attention_factor": 1.0,
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}
KINDS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=32),
    "qwen2": Qwen2Config(**SHAPE),  # q, k and v have biases
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),  # queries and keys have norms
    "longrope": LlamaConfig(**SHAPE, rope_parameters=LONGROPE),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2),
}
LENGTHS = (40, 30, 9, 5)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fused")
    for kind, config in KINDS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):  # zero in a fresh model: nobody would see it left out
                torch.nn.init.normal_(weight, std=0.5)
        model.save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


def quantized(base: Path, precision: Any, compute_dtype: Any) -> Path:
    folder = base.with_name(f"{base.name}-{precision}-{compute_dtype}")
    if not folder.exists():
        folder.mkdir()
        convert(base, folder, tiny.quantization(precision, compute_dtype), DEVICE)
    return folder


def conversations(seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    return [
        Example(random.integers(3, 384, n), random.random(n) < 0.6, i)
        for i, n in enumerate(LENGTHS)
    ]


def step(
    model: PeftModel, module: Any, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, Gradients]:
    """Losses and gradients, by the fused step (`patch`) or the modules (`scoring`)."""
    model.zero_grad()
    with lora.dequantization_buffer():
        rows = packing.packed_rows(model.config, conversations(seed), DEVICE)
        with autocast(DEVICE, dtype):
            losses = torch.cat([module.negative_log_likelihoods(model, row) for row in rows])
        losses.mean().backward()
    return losses.detach(), gradients_of(model)


@pytest.mark.parametrize("precision", ["nf4", "fp4", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_step_equals_the_modules(bases: dict[str, Path], kind: str, precision: str) -> None:
    folder = quantized(bases[kind], precision, "fp32")
    losses, gradients = step(moved(folder, DEVICE), scoring, torch.float32)
    model = moved(folder, DEVICE)
    patch.fuse(model)
    fused_losses, fused_gradients = step(model, patch, torch.float32)
    assert torch.allclose(fused_losses, losses, atol=2e-5)
    assert distance(fused_gradients, gradients) < 1e-5


def error(gradients: Gradients, truth: Gradients) -> float:
    """Of all gradients together, squared and relative."""
    squares = sum(float((gradients[n] - truth[n]).square().sum()) for n in truth)
    return squares / sum(float(g.square().sum()) for g in truth.values())


def hold_routing(models: list[PeftModel]) -> None:
    """Let the first model's routers choose for the others, of their own probabilities.

    One token in 80 changes its experts in bf16, whoever computes, and moves the gradient by more
    than all rounding: 8 steps have a distance of 0.06 to 0.20 so, and of 0.06 with the same ones.
    """
    choices: dict[str, torch.Tensor] = {}

    def route(name: str, first: bool, normed: bool, _: Any, _inputs: Any, output: Any) -> Any:
        logits, weights, index = output
        index = choices[name] = index if first else choices[name]
        own = logits.float().softmax(-1).gather(1, index)
        return logits, (own / own.sum(-1, keepdim=True) if normed else own).to(weights.dtype), index

    for model in models:
        normed = getattr(model.config, "norm_topk_prob", True)
        for name, router in model.named_modules():
            if name.endswith("mlp.gate"):
                router.register_forward_hook(partial(route, name, model is models[0], normed))


@pytest.mark.parametrize("kind", KINDS)
def test_fused_step_rounds_no_more_than_the_modules(
    bases: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distance of gradients in bf16 from those in fp32."""
    monkeypatch.setattr(precision, "has_bf16_matmuls", lambda kind: True)  # slowly, on some CPUs
    folder = quantized(bases[kind], "nf4", "bf16")
    exact = moved(folder, DEVICE).float()
    for module in exact.modules():
        if hasattr(module, "quant_state") or hasattr(module, "compute_dtype"):
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    modules, fused = moved(folder, DEVICE), moved(folder, DEVICE)
    patch.fuse(fused)
    hold_routing([exact, modules, fused])
    ours = theirs = 0.0
    for seed in range(8):  # of one step alone, either may be a quarter nearer by chance
        _, truth = step(exact, scoring, torch.float32, seed)
        theirs += error(step(modules, scoring, torch.bfloat16, seed)[1], truth)
        ours += error(step(fused, patch, torch.bfloat16, seed)[1], truth)
    assert 1e-4 < (theirs / 8) ** 0.5 < 0.1
    assert ours < 1.2 * theirs


def test_attention_mask_is_made_only_beyond_the_window(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above has a conversation of 40 tokens, and Mistral's window here is 32."""
    causal: Any = moved(quantized(bases["mistral"], "fp32", "fp32"), DEVICE).get_base_model()
    weight = causal.lm_head.weight

    def needs_mask() -> bool:
        return attention.needs_mask(causal.config, LENGTHS, weight)

    assert needs_mask()
    with monkeypatch.context() as kernel:
        kernel.setattr(attention, "has_kernel", lambda *_: True)
        assert not needs_mask()
        kernel.setattr(causal.config, "attention_dropout", 0.1)  # which the kernel lacks
        assert needs_mask()
    causal.config.sliding_window = 40
    assert not needs_mask()
    causal.set_attn_implementation("sdpa")
    assert needs_mask()


def test_scoring_does_not_use_the_fused_step(bases: dict[str, Path]) -> None:
    model = moved(quantized(bases["llama"], "nf4", "bf16"), DEVICE)
    batch = packing.pack(conversations(), DEVICE)
    with torch.no_grad(), autocast(DEVICE, torch.bfloat16):
        before = scoring.supervised_logits(model, batch)
        patch.fuse(model)
        after = scoring.supervised_logits(model, batch)
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantized_weight_reuses_a_buffer_within_a_step(kind: str, dtype: torch.dtype) -> None:
    def dequantize() -> torch.Tensor:
        return bnb.dequantize_4bit_into(codes, state, lora._buffer)

    codes, state = bnb.quantize_4bit(
        torch.randn(48, 80).to(dtype), quant_type=kind, compress_statistics=False
    )
    expected = bnb.dequantize_4bit(codes, state)
    assert torch.equal(dequantize(), expected)
    with lora.dequantization_buffer():
        first = dequantize()
        assert torch.equal(first, expected)
        assert dequantize().data_ptr() == first.data_ptr()


@pytest.mark.parametrize(
    ("shape", "block", "double_quant"), [((48, 80), 64, True), ((8, 4096), 2048, False)]
)
def test_weight_beyond_the_buffer_is_dequantized_too(
    shape: tuple[int, int], block: int, double_quant: bool
) -> None:
    codes, state = bnb.quantize_4bit(
        torch.randn(shape), blocksize=block, quant_type="nf4", compress_statistics=double_quant
    )
    with lora.dequantization_buffer():
        result = bnb.dequantize_4bit_into(codes, state, lora._buffer)
    assert torch.equal(result, bnb.dequantize_4bit(codes, state))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepared(tmp_path_factory.mktemp("data") / "prepared")


@pytest.mark.parametrize(
    ("precision", "changes", "path"),
    [
        ("nf4", {}, "fused"),
        ("nf4", {"lora__init": "pissa"}, "stock: lora.init is pissa or olora"),
        ("bf16", {"train__method": "full"}, "stock: train.method is full"),
    ],
)
def test_metrics_say_why_a_step_is_not_fused(
    tmp_path: Path, data: Path, precision: str, changes: dict[str, Any], path: str
) -> None:
    metrics, _, _ = run(tmp_path, data, precision, train__max_steps=1, **changes)
    assert metrics["path"].startswith(path)


def test_fused_step_can_be_switched_off(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_FUSED", "false")
    machine.machine.cache_clear()
    metrics, _, _ = run(tmp_path, data, "nf4", train__max_steps=1)
    machine.machine.cache_clear()
    assert metrics["path"] == "stock: QLORA_FUSED is false"
