"""Which attention runs, and that each gives what the library's own gives with its mask."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from stages.shared.model import attention, packing, scoring
from stages.shared.model.packing import Example
from tests import tiny
from tests.shared import flash_kernel

CPU = torch.device("cpu")
LENGTHS = (9, 4, 17)
WINDOW = 6


class Calls(TorchFunctionMode):
    """What was called of torch, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))

    def count(self) -> tuple[int, int]:
        """Calls of torch's kernel for all conversations, and of its ordinary attention."""
        kernel = sum("_varlen_attn" in name for name in self.names)
        return kernel, self.names.count("scaled_dot_product_attention")


@pytest.fixture
def covered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that has the kernel, as a GPU does."""
    monkeypatch.setattr(attention, "has_kernel", lambda *_: True)
    with flash_kernel.on_a_cpu():
        yield


def called(lengths: tuple[int, ...] | None = LENGTHS, **kwargs: Any) -> tuple[int, int]:
    layer = nn.Module()
    layer.num_key_value_groups = 2  # type: ignore[assignment]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 30, 8) for heads in (4, 2, 2))
    with Calls() as calls:
        result, _ = attention.attend(
            layer, query, key, value, None, lengths, **{"scaling": 0.3, "dropout": 0.0} | kwargs
        )
    assert result.shape == (1, 30, 4, 8)
    return calls.count()


@pytest.mark.usefixtures("covered")
def test_a_kernel_takes_all_conversations_at_once_unless_something_is_dropped_out() -> None:
    assert called() == (1, 0)
    assert called(sliding_window=WINDOW) == (1, 0)
    assert called(lengths=None) == (0, 1)
    assert called(dropout=0.5) == (0, 3)
    assert called(dropout=0.5, sliding_window=WINDOW) == (0, 1)


def test_a_cpu_has_none_and_goes_by_the_mask_only_beyond_a_window() -> None:
    assert called() == (0, 0)
    assert called(sliding_window=17) == (0, 0)
    assert called(sliding_window=16) == (0, 1)
    assert called(lengths=None) == (0, 1)
    assert called(dropout=0.5) == (0, 3)


@pytest.mark.usefixtures("covered")
def test_the_kernel_is_given_one_half_precision_as_autocast_would() -> None:
    """Rotated queries and keys of a model whose weights are fp32 come in fp32, values do not."""
    query, key, value = (torch.randn(1, 2, 30, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = attention.attend(
            nn.Module(), query, key, value.bfloat16(), None, LENGTHS, scaling=0.3
        )
    assert result.dtype == torch.bfloat16


def windowed() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW,
        initializer_range=0.2,
    )
    return MistralForCausalLM(config).eval()


def losses_and_gradient(model: PreTrainedModel, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    model.set_attn_implementation(name)
    model.zero_grad()
    random = np.random.default_rng(0)
    rows = [Example(random.integers(3, 384, n), np.ones(n, bool), n) for n in LENGTHS]
    losses = scoring.negative_log_likelihoods(model, packing.pack(rows, CPU))
    losses.sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return losses.detach(), torch.cat(gradients)


@pytest.mark.parametrize("model", [tiny.model(), windowed()], ids=["llama", "mistral"])
@pytest.mark.usefixtures("covered")
def test_a_model_learns_the_same_by_the_kernel(model: LlamaForCausalLM) -> None:
    with Calls() as calls:
        losses, gradient = losses_and_gradient(model, attention.NAME)
    assert calls.count() == (2, 0)
    expected, wanted = losses_and_gradient(model, "sdpa")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert (gradient - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_a_packed_row_goes_through_a_model_without_a_wait() -> None:
    """From conversations on the host to the gradient; a mask for nobody spares the library's."""
    device = torch.device("cuda", 0)
    model = windowed().to(device, torch.bfloat16)
    model.set_attn_implementation(attention.NAME)
    nobody = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    random = np.random.default_rng(0)

    def step() -> None:
        rows = [Example(random.integers(3, 384, n), np.ones(n, bool), n) for n in LENGTHS]
        batch = packing.pack(rows, device)
        attention.cumulative_lengths.cache_clear()
        output = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=nobody,
            use_cache=False,
            conversation_lengths=batch.lengths,
        )
        output.logits[0, batch.predictors].float().logsumexp(-1).sum().backward()

    step()  # libraries wait while they start
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("name", "window", "longest", "kernel", "needed"),
    [
        (attention.NAME, None, 100, False, False),
        (attention.NAME, 32, 32, False, False),
        (attention.NAME, 32, 33, False, True),
        (attention.NAME, 32, 33, True, False),
        ("sdpa", None, 100, True, True),
    ],
    ids=[
        "no window",
        "short",
        "longer than the window",
        "a kernel knows the window",
        "by its mask",
    ],
)
def test_a_mask_is_needed_where_a_layer_looks_back_less_far_and_no_kernel_knows(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    window: int | None,
    longest: int,
    kernel: bool,
    needed: bool,
) -> None:
    asked: list[tuple[Any, ...]] = []

    def covers(*of: Any) -> bool:
        asked.append(of)
        return kernel

    monkeypatch.setattr(attention, "has_kernel", covers)
    config = MistralConfig(
        hidden_size=64, num_attention_heads=4, sliding_window=window, attn_implementation=name
    )
    weight = torch.empty(2, 2, dtype=torch.bfloat16)
    assert attention.needs_mask(config, (3, longest), weight) is needed
    assert all(of == (weight.device, torch.bfloat16, 16, 16) for of in asked)
