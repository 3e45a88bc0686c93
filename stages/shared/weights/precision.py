"""Dtypes: of weights, of matmuls on a device, and of autocast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Autocast for every forward pass, in training, evaluation and generation alike.

    Half-precision matmuls with fp32 adapters or master weights; nothing at all in fp32. The same
    adapter with and without it agrees with itself in only 98 % of its most likely tokens, so it is
    decided here and nowhere else.
    """
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def has_bf16_matmuls(device_type: str) -> bool:
    """Whether a device type, `cpu` or `cuda`, has fast bf16 matmuls.

    A CPU without AVX512 (or ARM's equivalent) has loops: 13 against 100 to 135 GFLOP/s in fp32.
    """
    mkldnn = torch.backends.mkldnn.is_available()
    return device_type != "cpu" or (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype that a device multiplies weights of `dtype` in: fp32 where it lacks those matmuls.

    No CPU has fp16's (2.5 GFLOP/s).
    """
    half = {torch.float16: device_type != "cpu", torch.bfloat16: has_bf16_matmuls(device_type)}
    return dtype if half.get(dtype, True) else torch.float32


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that autocast gives matmuls, or the input's own outside of it."""
    device_type = x.device.type
    enabled = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else x.dtype


@contextmanager
def exact_matmuls(dtype: torch.dtype) -> Iterator[None]:
    """fp32 matmuls of values that all fit into `dtype`, which are exact in it.

    A CPU that has bf16 in hardware multiplies them there, a third faster, and sums in fp32.
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
