"""liger-kernel's kernels compute what the operations of torch beside them compute.

They want a GPU. Without one Triton can emulate them, slowly: TRITON_INTERPRET=1 pytest <this file>
"""

import os

import numpy as np
import pytest
import torch

from stages.train.fused import attention, feed_forward, kernels, norm

pytest.importorskip("liger_kernel", reason="liger-kernel is used where it is installed")
EMULATED = os.environ.get("TRITON_INTERPRET") == "1"
if not (EMULATED or torch.cuda.is_available()):
    pytest.skip("no CUDA device here, and Triton does not emulate one", allow_module_level=True)

if EMULATED:  # which lacks two things: numbers that are given to a kernel, and libdevice
    from liger_kernel.ops import rms_norm
    from triton import language
    from triton.runtime import interpreter

    given = interpreter._implicit_cvt

    def converted(value: object) -> object:
        if not isinstance(value, float):
            return given(value)
        handle = interpreter.TensorHandle(np.array([value], np.float32), language.float32)
        return language.tensor(handle, language.float32)

    interpreter._implicit_cvt = converted
    rms_norm.rsqrt = lambda x: language.rsqrt(x)  # noqa: PLW0108  (as it is when it runs)

DEVICE = torch.device("cpu" if EMULATED else "cuda")
TOKENS, WIDTH, HEADS, SHARED, SIZE, EPSILON = 21, 96, 6, 2, 16, 1e-5
# The emulation computes with numpy, which has no bf16.
HALF = torch.float16 if EMULATED else torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF])


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def by(monkeypatch: pytest.MonkeyPatch, *, kernel: bool) -> None:
    monkeypatch.setattr(kernels, "cover", lambda _: kernel)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    limit = 1e-5 if expected.dtype == torch.float32 else 8e-3
    apart = (found.double() - expected.double()).norm() / expected.double().norm()
    assert apart < limit, apart


@DTYPES
def test_norm_and_its_gradient(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x, weight = random(TOKENS, WIDTH, dtype=dtype), random(WIDTH, dtype=dtype, seed=1)
    gradient = random(TOKENS, WIDTH, dtype=dtype, seed=2)
    results = []
    for kernel in (False, True):
        by(monkeypatch, kernel=kernel)
        y, root = norm.normed(x, weight, EPSILON)
        again = norm.normed_again(x, root, weight, EPSILON)
        results.append((y, root, again, norm.norm_gradient(gradient, x, root, weight)))
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected)


@DTYPES
def test_turning_there_and_back(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    query = random(TOKENS, HEADS * SIZE, dtype=dtype)
    key = random(TOKENS, SHARED * SIZE, dtype=dtype, seed=1)
    angles = random(TOKENS, SIZE // 2, dtype=torch.float32, seed=2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    before = query.clone()
    by(monkeypatch, kernel=False)
    expected = attention._both_turned(query, key, cos, sin)
    by(monkeypatch, kernel=True)
    found = attention._both_turned(query, key, cos, sin)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    assert torch.equal(query, before)
    for one, other in zip(attention._both_turned(*found, cos, -sin), (query, key), strict=True):
        assert_close(one, other)


@DTYPES
def test_the_gate_and_its_gradients(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    gate, up, gradient = (random(TOKENS, WIDTH, dtype=dtype, seed=seed) for seed in range(3))
    results = []
    for kernel in (False, True):
        by(monkeypatch, kernel=kernel)
        own = gate.clone(), up.clone()  # the kernel puts the gradients into their place
        first = feed_forward._gated(*own)
        result, gradients = feed_forward._gated_again(*own)
        results.append((first, result, *gradients(gradient.clone())))
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected)
