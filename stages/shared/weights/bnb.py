"""bitsandbytes, imported here only and before peft or transformers do.

It decorates two functions with `torch.compile`, which imports most of torch's compiler: 0.7 seconds
and 40 MB of each process. They dequantize where no device's kernel does, and stay as written.
"""

import ctypes
import logging
import warnings
from collections.abc import Callable
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import nn

from stages.shared.core import bounds  # noqa: F401  (no code from the hub)
from stages.shared.weights.precision import compute_dtype

# On a CPU it warns of a missing hub kernel, and of a cast in every int8 matmul.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return function or _uncompiled


with patch.object(torch, "compile", _uncompiled):
    from bitsandbytes.autograd import _functions as autograd  # noqa: F401
    from bitsandbytes.cextension import lib
    from bitsandbytes.functional import (  # noqa: F401  (for the other modules)
        QuantState,
        dequantize_4bit,
        dequantize_blockwise,
        get_4bit_type,
        int8_vectorwise_dequant,
        int8_vectorwise_quant,
        quantize_4bit,
    )
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit  # noqa: F401
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit  # noqa: F401
    from bitsandbytes.optim.optimizer import Optimizer8bit  # noqa: F401

_C_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LARGEST_BLOCK = 1024  # the C functions are inaccurate beyond it


def dequantize_4bit_into(
    codes: torch.Tensor, state: QuantState, buffer: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """`dequantize_4bit` on a CPU into `buffer(shape, dtype)`; the library's has no `out` there.

    Source: bitsandbytes 0.50.2, bitsandbytes/backends/cpu/ops.py, `dequantize_4bit`.
    """
    name = f"cdequantize_blockwise_cpu_{state.quant_type}_{_C_DTYPES[state.dtype]}"
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    covered = absmax.dtype == torch.float32
    covered &= state.blocksize <= _LARGEST_BLOCK and state.shape[-1] % 2 == 0
    if not covered or not hasattr(lib, name):
        return dequantize_4bit(codes, state)
    out = buffer(state.shape, state.dtype)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (codes, absmax, out))
    getattr(lib, name)(*pointers, *map(ctypes.c_longlong, (state.blocksize, *out.shape)))
    return out


def quantized_layers(model: nn.Module) -> dict[str, Linear4bit | Linear8bitLt]:
    """Quantized layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}


def guard(model: nn.Module, device: torch.device) -> None:
    """Prevent weight repacking, and dequantize to one dtype in forward, backward and merge.

    On a CPU with AVX512-BF16, an evaluation forward of `Linear4bit` repacks the weight in place,
    and whatever reads it later reads garbage (gradient norm 3.07 before, 0.50 after). The forward
    pass would take the layer's compute dtype, the others the quantization state's.
    """
    for layer in quantized_layers(model).values():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            layer.compute_dtype = compute_dtype(layer.compute_dtype, device.type)
            cast(Params4bit, layer.weight).quant_state.dtype = layer.compute_dtype
