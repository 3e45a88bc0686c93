"""GPU kernels against torch on a CPU: Triton's own emulation, slowly, by `make emulate`.

liger-kernel is an extra (`gpu`); its three kernels are tested where it is installed.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, silu

from stages.shared.step.fused import block, gpu, rms_norm
from stages.shared.weights.bnb import dequantize_4bit, quantize_4bit

pytest.importorskip("triton", reason="Triton comes with torch for GPUs")
EMULATED = os.environ.get("TRITON_INTERPRET") == "1"
if not (EMULATED or torch.cuda.is_available()):
    pytest.skip("no CUDA device here, and Triton does not emulate one", allow_module_level=True)

if EMULATED:  # it takes no Python floats
    from triton import language
    from triton.runtime import interpreter

    original = interpreter._implicit_cvt

    def convert(value: object) -> object:
        if not isinstance(value, float):
            return original(value)
        handle = interpreter.TensorHandle(np.array([value], np.float32), language.float32)
        return language.tensor(handle, language.float32)

    interpreter._implicit_cvt = convert

DEVICE = torch.device("cpu" if EMULATED else "cuda")
HALF = torch.float16 if EMULATED else torch.bfloat16  # the emulation is numpy's, without bf16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF])


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    """By Frobenius norm; NaN is never close."""
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    limit = 1e-5 if expected.dtype == torch.float32 else 8e-3
    assert (result.double() - expected.double()).norm() / expected.double().norm() < limit


@DTYPES
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(320, 192), (5, 64), (7, 34)])  # the last ends in half a block
def test_dequantize_equals_bitsandbytes(
    shape: tuple[int, int], kind: str, double_quant: bool, dtype: torch.dtype
) -> None:
    matrix = random(*shape, dtype=dtype)
    codes, state = quantize_4bit(matrix, quant_type=kind, compress_statistics=double_quant)
    # With double quantization absmax is rounded once less: the last bit of fp32.
    torch.testing.assert_close(
        gpu.kernels().dequantize(codes, state, dtype),
        dequantize_4bit(codes, state),
        rtol=2e-7 if dtype == torch.float32 else 0,
        atol=0,
    )


@DTYPES
def test_swiglu_backward_overwrites_its_inputs(dtype: torch.dtype) -> None:
    buffers = [random(29, 96, dtype=dtype, seed=seed) for seed in range(3)]
    gate, up = (x.double().requires_grad_() for x in buffers[:2])
    y = silu(gate) * up
    gradients = torch.autograd.grad(y, (gate, up), buffers[2].double())
    gpu.kernels().swiglu_backward(*buffers)
    for result, expected in zip(buffers, (*gradients, y.detach()), strict=True):
        assert_close(result, expected.to(dtype))


@DTYPES
@pytest.mark.parametrize("vocabulary", [300, 8192, 20_000])  # less than one part, one, and more
def test_cross_entropy_turns_logits_into_gradients(vocabulary: int, dtype: torch.dtype) -> None:
    logits = 4 * random(5, vocabulary, dtype=dtype)
    targets = torch.tensor([0, vocabulary - 1, 7, 7, 299], device=DEVICE)
    logits[3, 7] = -200.0  # of no probability in fp32
    exact = logits.double().requires_grad_()
    expected = cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    losses = torch.empty(5, device=DEVICE)
    gpu.kernels().cross_entropy(logits, targets, losses)
    assert_close(losses, expected.detach().float())
    assert_close(logits, gradient.to(dtype))


def norm_and_gradient(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, dy, weight = (
        random(*s, dtype=dtype, seed=i) for i, s in enumerate([(21, 96)] * 2 + [(96,)])
    )
    norm = SimpleNamespace(weight=weight, variance_epsilon=1e-5)
    y, rstd = rms_norm.rms_norm_forward(norm, x)
    again = rms_norm.recompute_rms_norm(norm, x, rstd)
    return y, rstd, again, rms_norm.rms_norm_backward(norm, dy, x, rstd)


def rope_and_back(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    query, key = random(21, 96, dtype=dtype), random(21, 32, dtype=dtype, seed=1)
    angles = random(21, 8, dtype=torch.float32, seed=2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    rotated = block.apply_rope_qk(query, key, cos, sin)
    return query, *rotated, *block.apply_rope_qk(*rotated, cos, -sin)


def swiglu(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (block.swiglu(*(random(21, 96, dtype=dtype, seed=seed) for seed in range(2))),)


@DTYPES
@pytest.mark.parametrize("compute", [norm_and_gradient, rope_and_back, swiglu])
def test_liger_equals_torch(
    monkeypatch: pytest.MonkeyPatch, compute: Callable[..., Any], dtype: torch.dtype
) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is used where it is installed")
    if EMULATED:  # which lacks libdevice
        from liger_kernel.ops import rms_norm as liger_rms_norm

        # Looked up when called: the emulation replaces it.
        monkeypatch.setattr(liger_rms_norm, "rsqrt", lambda x: language.rsqrt(x))  # noqa: PLW0108
    results = []
    for covered in (False, True):
        monkeypatch.setattr(gpu, "uses_liger", lambda _, covered=covered: covered)
        results.append(compute(dtype))
    for expected, result in zip(*results, strict=True):
        assert_close(result, expected)
