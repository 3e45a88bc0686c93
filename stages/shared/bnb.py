"""What the stages use of bitsandbytes, imported here and before anything else imports it.

It decorates functions of its own with `torch.compile`, and that alone imports the greater part of
torch's compiler: 0.7 seconds and 40 MB of each process, for functions that a stage hardly ever
calls. Imported from here, they are compiled when they are called first.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any, cast

import torch

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
    "get_4bit_type",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "quantize_4bit",
]
