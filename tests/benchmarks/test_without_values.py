"""The step of a GPU on tensors without values: what the plan says of it, and what it catches."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from benchmarks import without_values
from benchmarks.memory_cuda import predict
from benchmarks.memory_without_values import LONG, PACKED, row_of
from benchmarks.training_step import Setting
from stages.shared.architecture import model_of
from stages.shared.fitting import GIB
from stages.shared.model import attention
from stages.shared.tensors import Model

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
KINDS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral, windowed": MistralConfig(**SHAPE, sliding_window=32),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}


def described(config: PretrainedConfig) -> Model:
    with torch.device("meta"):
        return model_of(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("lengths", [(90, 40, 120), (3000,)], ids=["short", "long"])
def test_the_plan_knows_the_peak_of_a_gpu_s_step_to_half_a_percent(
    kind: str, checkpointed: bool, lengths: tuple[int, ...]
):
    setting = Setting("nf4", 8, checkpointed, lengths)
    counted = without_values.measure(KINDS[kind], setting)
    predicted = predict(described(KINDS[kind]), setting)
    assert predicted.calibrated
    assert predicted.total_bytes == pytest.approx(counted.peak_bytes, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "checkpointed", "lengths", "gib"),
    [
        ("Llama-3-8B", False, PACKED, 29.61),
        ("Llama-3-8B", True, PACKED, 9.18),
        ("Mistral-7B", True, LONG, 17.20),
    ],
    ids=["8B, 8,192 tokens: 29.61 GiB", "checkpointed: 9.18 GiB", "7B, a window passed: 17.20 GiB"],
)
def test_at_the_size_of_real_models_to_a_thousandth(
    name: str, checkpointed: bool, lengths: tuple[int, ...], gib: float
):
    row = row_of(name, Setting("nf4", 16, checkpointed, lengths, supervised=1.0))
    assert row.counted / GIB == pytest.approx(gib, abs=0.005)
    assert abs(row.error) < 1e-3


def test_where_the_host_would_wait_for_the_device_it_cannot_go_on(monkeypatch: pytest.MonkeyPatch):
    """As it did with a window: transformers made a mask, and looked into the positions for it."""
    monkeypatch.setattr(attention, "needs_mask", lambda *_: True)
    with pytest.raises(RuntimeError, match="item"):
        without_values.measure(KINDS["mistral, windowed"], Setting("nf4", 8, False, (90, 40)))


def test_a_tensor_of_the_host_among_those_of_the_device_is_found():
    there, here = torch.empty(3, 2, device="meta"), torch.tensor([0, 2])
    with without_values.OneDevice():
        there + torch.tensor(2.0)
        there.copy_(torch.ones(3, 2))
        with pytest.raises(AssertionError, match="cpu and meta"):
            there[here]
