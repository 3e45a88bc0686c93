"""What numbers are computed in."""

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Where every forward pass runs, in training, evaluation and generation alike.

    Half-precision products with fp32 adapters or master weights; nothing at all in fp32. The same
    adapter with and without it agrees with itself in only 98 % of its most likely tokens, so it is
    decided here and nowhere else.
    """
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def of_products(x: torch.Tensor) -> torch.dtype:
    """What autocast has matrix products run in, or the input's own dtype outside of it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
