"""Dtypes of weights, matmuls and autocast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Autocast for every forward pass in training, evaluation and generation; none in fp32.

    An adapter with and without it agrees in only 98 % of top-1 tokens.
    """
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def has_bf16_matmuls(device_type: str) -> bool:
    """Whether a device has fast bf16 matmuls.

    A CPU without AVX512 (or ARM's equivalent) has loops: 13 against 100 to 135 GFLOP/s in fp32.
    """
    mkldnn = torch.backends.mkldnn.is_available()
    return device_type != "cpu" or (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Matmul dtype for weights of `dtype`: fp32 where the device lacks fast matmuls in it.

    No CPU has fast fp16 (2.5 GFLOP/s).
    """
    half = {torch.float16: device_type != "cpu", torch.bfloat16: has_bf16_matmuls(device_type)}
    return dtype if half.get(dtype, True) else torch.float32


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype, or the input's own outside autocast."""
    device_type = x.device.type
    enabled = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else x.dtype


@contextmanager
def exact_matmuls(dtype: torch.dtype) -> Iterator[None]:
    """Context for fp32 matmuls whose inputs all fit `dtype` exactly.

    A CPU with bf16 in hardware multiplies in bf16 and sums in fp32, a third faster.
    """
    if dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
