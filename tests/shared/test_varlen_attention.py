"""One call for all conversations of a packed row gives what torch gives with a mask.

On a CPU, what we ask of the kernel is held against torch's other attention; on a GPU the kernel is.
"""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from stages.shared.model.attention import cumulative_lengths, flash_attend, has_kernel
from tests.shared import flash_kernel

CPU = torch.device("cpu")
HEADS, SIZE, SCALE = 4, 16, 0.3
LENGTHS = (20, 1, 9, 33)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture
def kernel_of_a_cpu() -> Iterator[None]:
    with flash_kernel.on_a_cpu():
        yield


def inputs(groups: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(sum(LENGTHS), n, SIZE) for n in (HEADS, groups, groups)]
    return [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]


def attended(given: list[torch.Tensor], window: int | None = None) -> torch.Tensor:
    query, key, value = given
    return flash_attend(query, key, value, SCALE, LENGTHS, window)


def compare(given: list[torch.Tensor], window: int | None, tolerance: float) -> None:
    """Result and gradients, relative to those of torch in fp64 with a mask."""
    result = attended(given, window)
    gradient = torch.randn_like(result)
    found = torch.autograd.grad(result, given, gradient)

    exact = [x.detach().cpu().double().requires_grad_() for x in given]
    blocks = [torch.ones(n, n).tril() for n in LENGTHS]
    if window:
        blocks = [block.triu(1 - window) for block in blocks]  # itself and window - 1 before it
    q, k, v = (x.transpose(0, 1)[None] for x in exact)
    mask = torch.block_diag(*blocks).bool()
    expected = scaled_dot_product_attention(q, k, v, mask, scale=SCALE, enable_gqa=True)
    expected = expected[0].transpose(0, 1)
    wanted = torch.autograd.grad(expected, exact, gradient.cpu().double())
    for one, other in zip((result, *found), (expected, *wanted), strict=True):
        assert (one.cpu() - other).norm() < tolerance * max(1.0, other.norm())


@pytest.mark.parametrize("window", [None, 1, 5, 33, 40])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.usefixtures("kernel_of_a_cpu")
def test_results_and_gradients_are_those_of_torch_with_a_mask(groups: int, window: int | None):
    compare(inputs(groups, CPU, torch.float32), window, 1e-6)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("groups", [4, 2])
def test_on_a_gpu_too(groups: int, window: int | None, dtype: torch.dtype):
    given = inputs(groups, torch.device("cuda", 0), dtype)
    if not has_kernel(given[0].device, given[0].dtype, SIZE, SIZE):
        pytest.skip("the kernel is not made for this GPU")
    compare(given, window, 5e-3 if dtype == torch.float16 else 2e-2)


@needs_gpu
def test_on_a_gpu_the_host_waits_for_nothing():
    given = inputs(2, torch.device("cuda", 0), torch.bfloat16)
    if not has_kernel(given[0].device, given[0].dtype, SIZE, SIZE):
        pytest.skip("the kernel is not made for this GPU")
    attended(given).sum().backward()
    cumulative_lengths.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attended(given, 5).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_torch_takes_the_call_and_gives_gradients_of_its_shapes():
    """On tensors without values: the signature of the real operator, in half precision."""
    meta = torch.device("meta")
    given = inputs(2, meta, torch.bfloat16)
    result = attended(given, 5)
    assert (result.shape, result.dtype) == (given[0].shape, torch.bfloat16)
    result.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in given)


def test_boundaries_are_made_once_for_all_layers():
    cumulative_lengths.cache_clear()
    found = cumulative_lengths((3, 1, 5), CPU)
    assert found.tolist() == [0, 3, 4, 9]
    assert found.dtype == torch.int32
    assert cumulative_lengths((3, 1, 5), CPU) is found
    assert cumulative_lengths((3, 1), CPU).tolist() == [0, 3, 4]


@pytest.mark.usefixtures("kernel_of_a_cpu")
def test_what_was_scored_can_be_trained_on():
    """What is made in inference mode cannot be kept for a backward pass."""
    cumulative_lengths.cache_clear()
    with torch.inference_mode():
        attended(inputs(2, CPU, torch.float32))
    attended(inputs(2, CPU, torch.float32)).sum().backward()


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "value_size", "covered"),
    [
        ((8, 0), torch.bfloat16, 128, 128, True),
        ((9, 0), torch.float16, 64, 64, True),
        ((12, 1), torch.bfloat16, 256, 256, True),
        ((7, 5), torch.float16, 128, 128, False),
        ((13, 0), torch.bfloat16, 128, 128, False),
        ((9, 0), torch.float32, 128, 128, False),
        ((9, 0), torch.bfloat16, 264, 264, False),
        ((9, 0), torch.bfloat16, 60, 60, False),
        ((9, 0), torch.bfloat16, 192, 128, False),
    ],
)
def test_what_the_kernel_is_made_for(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    size: int,
    value_size: int,
    covered: bool,
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_kernel(torch.device("cuda", 0), dtype, size, value_size) is covered
    for other in ("cpu", "meta"):  # which are not asked what they can
        assert not has_kernel(torch.device(other), dtype, size, value_size)
