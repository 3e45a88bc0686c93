"""Dtypes of weights, matmuls and autocast."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import ceil, prod

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DENSE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BLOCK = 64  # weights that share a constant in fp4 and nf4
NESTED_BLOCK = 256  # constants that share a constant with double quantization


def stored_bytes(shape: Sequence[int], precision: str, double_quant: bool) -> int:
    """Bytes of a matrix, without codebooks of a fixed size.

    int8 has an fp32 constant a row (LLM.int8(), arXiv:2208.07339, 2.1), 4-bit types one a block, or
    with double quantization a byte a block and an fp32 constant for 256 blocks (QLoRA,
    arXiv:2305.14314, 3): 4.5 or 4.127 bits a parameter.
    """
    count = prod(shape)
    if precision in DENSE_BYTES:
        return DENSE_BYTES[precision] * count
    if precision == "int8":
        return count + 4 * (count // shape[-1])
    blocks = ceil(count / BLOCK)
    constants = blocks + 4 * ceil(blocks / NESTED_BLOCK) if double_quant else 4 * blocks
    return ceil(count / 2) + constants


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Autocast, none in fp32; with and without it an adapter agrees in 98 % of top-1 tokens."""
    if dtype == torch.float32:
        return nullcontext()
    # Its cache would keep a cast copy of every weight until the context ends.
    return torch.autocast(device.type, dtype, cache_enabled=False)


def has_bf16_matmuls(device_type: str) -> bool:
    """Fast bf16 matmuls; a CPU without AVX512 or the like has 13 GFLOP/s, in fp32 at least 100."""
    mkldnn = torch.backends.mkldnn.is_available()
    return device_type != "cpu" or (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """`dtype` if the device has fast matmuls in it, else fp32; no CPU has fp16's (2.5 GFLOP/s)."""
    half = {torch.float16: device_type != "cpu", torch.bfloat16: has_bf16_matmuls(device_type)}
    return dtype if half.get(dtype, True) else torch.float32


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype, or the input's own outside autocast."""
    device_type = x.device.type
    enabled = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else x.dtype


@contextmanager
def exact_matmuls(dtype: torch.dtype) -> Iterator[None]:
    """fp32 matmuls whose inputs all fit `dtype`: by a CPU's bf16 hardware, a third faster."""
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
