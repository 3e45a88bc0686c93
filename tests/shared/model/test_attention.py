"""Which attention runs, and that torch's kernel is asked for what torch computes with a mask.

On a CPU the kernel is written out (`flash_kernel`); on a GPU it is the real one.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaForCausalLM, MistralConfig, PreTrainedModel

from stages.shared.model import attention, packing, scoring
from stages.shared.model.attention import cumulative_lengths, flash_attend, has_kernel
from stages.shared.model.packing import Example
from tests import tiny
from tests.architectures import random
from tests.shared.model import flash_kernel
from tests.shared.model.flash_kernel import assert_exact

CPU = torch.device("cpu")
HEADS, SIZE, SCALE = 4, 16, 0.3
LENGTHS = (20, 1, 9, 33)
WINDOW = 6
WINDOWED = {"sliding_window": WINDOW}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class Calls(TorchFunctionMode):
    """Counts calls of torch's kernel for all conversations, and of its ordinary attention."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))

    def count(self) -> tuple[int, int]:
        kernel = sum("_varlen_attn" in name for name in self.names)
        return kernel, self.names.count("scaled_dot_product_attention")


@pytest.fixture
def kernel() -> Iterator[None]:
    with flash_kernel.on_a_cpu():
        yield


@pytest.fixture
def covered(monkeypatch: pytest.MonkeyPatch, kernel: None) -> None:
    """A CPU that has the kernel, as a GPU does."""
    monkeypatch.setattr(attention, "has_kernel", lambda *_: True)


def calls(lengths: tuple[int, ...] | None = (9, 4, 17), **kwargs: Any) -> tuple[int, int]:
    layer = nn.Module()
    layer.num_key_value_groups = 2  # type: ignore[assignment]
    query, key, value = (torch.randn(1, heads, 30, 8) for heads in (4, 2, 2))
    with Calls() as seen:
        result, _ = attention.attend(
            layer, query, key, value, None, lengths, **{"scaling": 0.3, "dropout": 0.0} | kwargs
        )
    assert result.shape == (1, 30, 4, 8)
    return seen.count()


@pytest.mark.usefixtures("covered")
def test_kernel_takes_all_conversations_without_dropout() -> None:
    assert calls() == (1, 0)
    assert calls(sliding_window=WINDOW) == (1, 0)
    assert calls(lengths=None) == (0, 1)
    assert calls(dropout=0.5) == (0, 3)
    assert calls(dropout=0.5, sliding_window=WINDOW) == (0, 1)


def test_cpu_goes_by_the_mask_only_beyond_a_window() -> None:
    assert calls() == (0, 0)
    assert calls(sliding_window=17) == (0, 0)
    assert calls(sliding_window=16) == (0, 1)
    assert calls(lengths=None) == (0, 1)
    assert calls(dropout=0.5) == (0, 3)


@pytest.mark.usefixtures("covered")
def test_kernel_is_given_one_half_precision() -> None:
    """Rotated queries and keys of a model whose weights are fp32 come in fp32, values do not."""
    query, key, value = (torch.randn(1, 2, 30, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = attention.attend(
            nn.Module(), query, key, value.bfloat16(), None, (9, 4, 17), scaling=0.3
        )
    assert result.dtype == torch.bfloat16


def examples() -> list[Example]:
    drawn = np.random.default_rng(0)
    return [Example(drawn.integers(3, 384, n), np.ones(n, bool), n) for n in (9, 4, 17)]


def losses_and_gradient(model: PreTrainedModel, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    model.set_attn_implementation(name)
    model.zero_grad()
    losses = scoring.negative_log_likelihoods(model, packing.pack(examples(), CPU))
    losses.sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return losses.detach(), torch.cat(gradients)


@pytest.mark.parametrize(
    "model", [tiny.model(), random("mistral", {"sliding_window": WINDOW})], ids=["llama", "mistral"]
)
@pytest.mark.usefixtures("covered")
def test_model_learns_the_same_by_the_kernel(model: LlamaForCausalLM) -> None:
    with Calls() as seen:
        losses, gradient = losses_and_gradient(model, attention.NAME)
    assert seen.count() == (2, 0)
    expected, due = losses_and_gradient(model, "sdpa")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert (gradient - due).norm() < 1e-5 * due.norm()


@needs_gpu
def test_packed_row_goes_through_a_model_without_a_wait() -> None:
    """From conversations on the host to the gradient; `nobody` spares the library's mask."""
    device = torch.device("cuda", 0)
    model = random("mistral", WINDOWED).to(device, torch.bfloat16)
    model.set_attn_implementation(attention.NAME)
    nobody = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)

    def step() -> None:
        batch = packing.pack(examples(), device)
        cumulative_lengths.cache_clear()
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
    ("name", "window", "longest", "covers", "needed"),
    [
        (attention.NAME, None, 100, False, False),
        (attention.NAME, 32, 32, False, False),
        (attention.NAME, 32, 33, False, True),
        (attention.NAME, 32, 33, True, False),
        ("sdpa", None, 100, True, True),
    ],
)
def test_mask_is_needed_beyond_a_window_without_kernel(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    window: int | None,
    longest: int,
    covers: bool,
    needed: bool,
) -> None:
    monkeypatch.setattr(attention, "has_kernel", lambda *of: covers and of[2:] == (16, 16))
    config = MistralConfig(
        hidden_size=64, num_attention_heads=4, sliding_window=window, attn_implementation=name
    )
    weight = torch.empty(2, 2, dtype=torch.bfloat16)
    assert attention.needs_mask(config, (3, longest), weight) is needed


def inputs(key_heads: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(sum(LENGTHS), n, SIZE) for n in (HEADS, key_heads, key_heads)]
    return [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]


def attended(x: list[torch.Tensor], window: int | None = None) -> torch.Tensor:
    query, key, value = x
    return flash_attend(query, key, value, SCALE, LENGTHS, window)


@pytest.mark.parametrize("window", [None, 1, 5, 33, 40])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.usefixtures("kernel")
def test_flash_attention_is_that_of_torch_with_a_mask(key_heads: int, window: int | None) -> None:
    x = inputs(key_heads, CPU, torch.float32)
    assert_exact(attended(x, window), x, SCALE, LENGTHS, window)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_flash_attention_on_a_gpu(key_heads: int, window: int | None, dtype: torch.dtype) -> None:
    x = inputs(key_heads, torch.device("cuda", 0), dtype)
    if not has_kernel(x[0].device, x[0].dtype, SIZE, SIZE):
        pytest.skip("the kernel is not made for this GPU")
    tolerance = 5e-3 if dtype == torch.float16 else 2e-2
    assert_exact(attended(x, window), x, SCALE, LENGTHS, window, tolerance)
    cumulative_lengths.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attended(x, 5).sum().backward()  # the host waits for nothing
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_real_operator_takes_the_call() -> None:
    """On tensors without values, in half precision."""
    x = inputs(2, torch.device("meta"), torch.bfloat16)
    result = attended(x, 5)
    assert (result.shape, result.dtype) == (x[0].shape, torch.bfloat16)
    result.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in x)


@pytest.mark.usefixtures("kernel")
def test_cumulative_lengths_are_cached_and_serve_training() -> None:
    """A tensor made in inference mode could not be kept for a backward pass."""
    cumulative_lengths.cache_clear()
    with torch.inference_mode():
        attended(inputs(2, CPU, torch.float32))
    attended(inputs(2, CPU, torch.float32)).sum().backward()
    offsets = cumulative_lengths((3, 1, 5), CPU)
    assert (offsets.tolist(), offsets.dtype) == ([0, 3, 4, 9], torch.int32)
    assert cumulative_lengths((3, 1, 5), CPU) is offsets
    assert cumulative_lengths((3, 1), CPU).tolist() == [0, 3, 4]


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "value_size", "covered"),
    [
        ((8, 0), torch.bfloat16, 128, 128, True),
        ((12, 1), torch.float16, 256, 256, True),
        ((7, 5), torch.float16, 128, 128, False),
        ((13, 0), torch.bfloat16, 128, 128, False),
        ((9, 0), torch.float32, 128, 128, False),
        ((9, 0), torch.bfloat16, 264, 264, False),
        ((9, 0), torch.bfloat16, 60, 60, False),
        ((9, 0), torch.bfloat16, 192, 128, False),
    ],
)
def test_kernel_is_made_for_these_heads_and_gpus(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    size: int,
    value_size: int,
    covered: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_kernel(torch.device("cuda", 0), dtype, size, value_size) is covered
    assert not has_kernel(CPU, dtype, size, value_size)
