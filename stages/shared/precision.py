"""What numbers are computed in."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Where every forward pass runs, in training, evaluation and generation alike.

    Half-precision products with fp32 adapters or master weights; nothing at all in fp32. The same
    adapter with and without it agrees with itself in only 98 % of its most likely tokens, so it is
    decided here and nowhere else.
    """
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def multiplies_bf16(kind: str) -> bool:
    """Whether torch has products of bf16 for a device, `cpu` or `cuda`.

    For a CPU without AVX512 (or what ARM has instead) it has loops, which take ten times as long as
    products of fp32: 13 against 100 to 135 GFLOP/s were measured.
    """
    mkldnn = torch.backends.mkldnn.is_available()
    return kind != "cpu" or (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def computed_in(dtype: torch.dtype, kind: str) -> torch.dtype:
    """What products run in on a device that are to run in `dtype`: in fp32 where it has none.

    No CPU has products of fp16.
    """
    has = {torch.float16: kind != "cpu", torch.bfloat16: multiplies_bf16(kind)}
    return dtype if has.get(dtype, True) else torch.float32


def of_products(x: torch.Tensor) -> torch.dtype:
    """What autocast has matrix products run in, or the input's own dtype outside of it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Products of fp32 tensors whose values are all of a half precision: exact all the same.

    A CPU that has bf16 in hardware multiplies them there, a third faster, and adds up in fp32.

    Args:
        dtype: what the values fit into.
    """
    if dtype != torch.bfloat16:
        yield
        return
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before
