"""What the stages use of bitsandbytes, imported here and before anything else imports it.

It decorates functions of its own with `torch.compile`, and that alone imports the greater part of
torch's compiler: 0.7 seconds and 40 MB of each process, for functions that a stage hardly ever
calls. Imported from here, they are compiled when they are called first.
"""

import ctypes
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any, cast

import torch

from stages.shared import rooms

# On a CPU it tells of a hub kernel it lacks, and of a cast with every int8 product.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")

_compile = torch.compile


def _compiled_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    if function is None:
        return partial(_compiled_when_called, **options)

    @cache
    def compiled() -> Callable[..., Any]:
        return _compile(function, **options)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


@contextmanager
def _compiling_late() -> Iterator[None]:
    torch.compile = cast(Any, _compiled_when_called)
    try:
        yield
    finally:
        torch.compile = _compile


with _compiling_late():
    from bitsandbytes.cextension import lib
    from bitsandbytes.functional import (
        QuantState,
        dequantize_4bit,
        dequantize_blockwise,
        get_4bit_type,
        int8_vectorwise_dequant,
        int8_vectorwise_quant,
        quantize_4bit,
    )
    from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
    from bitsandbytes.optim.optimizer import Optimizer8bit

# What a CPU's functions call the dtypes of their results.
_RESULTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_INACCURATE_BLOCK = 2048  # of which on, with AVX512, bitsandbytes itself computes otherwise


def dequantized(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """A 4-bit matrix as `dequantize_4bit` gives it, in a CPU's scratch room where it can be.

    The operator of bitsandbytes has no `out` on a CPU; what it calls is called here.

    Args:
        codes: uint8, two numbers a byte.
        state: `QuantState` of them.

    Source: bitsandbytes 0.50.2, bitsandbytes/backends/cpu/ops.py, `dequantize_4bit`.
    """
    function = _function(state) if codes.device.type == "cpu" else None
    if function is None:
        return dequantize_4bit(codes, state)
    room = rooms.scratch(state.shape, state.dtype, codes.device)
    rows, columns = room.shape
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (codes, state.absmax, room))
    sizes = (ctypes.c_longlong(n) for n in (state.blocksize, rows, columns))
    function(*pointers, *sizes)
    return room


def _function(state: Any) -> Any:
    """What dequantizes a matrix on a CPU; None where it does not cover it."""
    plain = not state.nested and state.absmax.dtype == torch.float32
    if not plain or state.blocksize >= _INACCURATE_BLOCK or state.shape[-1] % 2:
        return None
    kind = f"{state.quant_type}_{_RESULTS[state.dtype]}"
    return getattr(lib, f"cdequantize_blockwise_cpu_{kind}", None)


__all__ = [
    "AdamW8bit",
    "Linear4bit",
    "Linear8bitLt",
    "Optimizer8bit",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "Params4bit",
    "QuantState",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantized",
    "get_4bit_type",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "quantize_4bit",
]
