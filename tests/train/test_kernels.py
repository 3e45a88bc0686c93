"""Our own kernels compute what the operations of torch and bitsandbytes compute on a CPU."""

import pytest
import torch
from torch.nn.functional import cross_entropy, silu

from stages.shared.bnb import dequantize_4bit, quantize_4bit
from stages.shared.step.fused import gpu
from tests.train.emulation import DEVICE, DTYPES, HALF, assert_close, random


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(320, 192), (5, 64), (7, 34)])  # the last ends in half a block
def test_a_4_bit_matrix_is_dequantized_as_bitsandbytes_does(
    shape: tuple[int, int], kind: str, double_quant: bool, dtype: torch.dtype
) -> None:
    matrix = random(*shape, dtype=dtype)
    codes, state = quantize_4bit(matrix, quant_type=kind, compress_statistics=double_quant)
    expected = dequantize_4bit(codes, state)
    found = gpu.kernels().dequantize(codes, state, dtype)
    assert found.dtype == dtype
    assert found.shape == matrix.shape
    # Constants of constants may be rounded once less: the last bit of fp32.
    torch.testing.assert_close(found, expected, rtol=2e-7 if dtype == torch.float32 else 0, atol=0)


@DTYPES
def test_the_gates_gradients_and_its_result_take_the_place_of_what_they_came_from(
    dtype: torch.dtype,
) -> None:
    given = [random(29, 96, dtype=dtype, seed=seed) for seed in range(3)]
    gate, up = (x.double().requires_grad_() for x in given[:2])
    result = silu(gate) * up
    wanted = torch.autograd.grad(result, (gate, up), given[2].double())
    gpu.kernels().swiglu_backward(*given)
    for found, expected in zip(given, (*wanted, result.detach()), strict=True):
        assert_close(found, expected.to(dtype))


@DTYPES
@pytest.mark.parametrize("vocabulary", [300, 8192, 20_000])  # less than one part, one, and more
def test_losses_of_logits_which_become_their_gradients(vocabulary: int, dtype: torch.dtype) -> None:
    tokens = 5
    logits = 4 * random(tokens, vocabulary, dtype=dtype)
    targets = torch.tensor([0, vocabulary - 1, 7, 7, 299], device=DEVICE)
    logits[3, 7] = -200.0  # of no probability in fp32
    exact = logits.double().requires_grad_()
    expected = cross_entropy(exact, targets, reduction="none")
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    losses = torch.empty(tokens, device=DEVICE)
    gpu.kernels().cross_entropy(logits, targets, losses)
    assert_close(losses, expected.detach().float())
    assert_close(logits, wanted.to(dtype))
