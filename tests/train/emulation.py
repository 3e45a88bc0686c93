"""Kernels of Triton on a GPU, or emulated on a CPU, slowly: TRITON_INTERPRET=1 pytest."""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with torch for GPUs")
EMULATED = os.environ.get("TRITON_INTERPRET") == "1"
if not (EMULATED or torch.cuda.is_available()):
    pytest.skip("no CUDA device here, and Triton does not emulate one", allow_module_level=True)

if EMULATED:  # which cannot be given numbers of the host with a point
    from triton import language
    from triton.runtime import interpreter

    given = interpreter._implicit_cvt

    def converted(value: object) -> object:
        if not isinstance(value, float):
            return given(value)
        handle = interpreter.TensorHandle(np.array([value], np.float32), language.float32)
        return language.tensor(handle, language.float32)

    interpreter._implicit_cvt = converted

DEVICE = torch.device("cpu" if EMULATED else "cuda")
# The emulation computes with numpy, which has no bf16.
HALF = torch.float16 if EMULATED else torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF])


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """By Frobenius norm; NaN is never close."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    limit = 1e-5 if expected.dtype == torch.float32 else 8e-3
    apart = (found.double() - expected.double()).norm() / expected.double().norm()
    assert apart < limit, apart
