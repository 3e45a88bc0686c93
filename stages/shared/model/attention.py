"""Attention for packed rows, computed inside each conversation only.

With transformers' mask, attention across conversations is computed and then masked: 15/16 of the
work for 16 conversations of equal length. Here a GPU calls the variable-length flash-attention
kernel, a CPU batched matmuls (`cpu_attention`), anything else SDPA once per conversation. SDPA with
the mask remains for generation (no lengths) and for a sliding window without the kernel.

Source: Dao 2023, FlashAttention-2, arXiv:2307.08691; torch 2.13, torch/nn/attention/varlen.py.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.shared.model import cpu_attention
from stages.shared.model.packing import to_device
from stages.shared.weights import precision

NAME = "sdpa_per_conversation"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    conversation_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers: [batch, tokens, heads, head size], and no weights.

    `query`, `key` and `value` are [batch, heads, tokens, head size], with `conversation_lengths`
    (tokens) a packed row.
    """
    lengths, window = conversation_lengths, kwargs.get("sliding_window")
    windowed = bool(lengths and window and max(lengths) > window)
    if lengths and not kwargs.get("dropout"):
        dtype = precision.matmul_dtype(query)
        # Not `[0]`, whose backward pass copies the gradient into zeros.
        q, k, v = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
        if has_kernel(q.device, dtype, q.shape[-1], v.shape[-1]):
            return flash_attend(q, k, v, kwargs["scaling"], lengths, window)[None], None
        if q.device.type == "cpu" and not windowed:
            return cpu_attention.attend(q, k, v, kwargs["scaling"], lengths)[None], None
    if not lengths or windowed:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in parts]
    return torch.cat(outputs, dim=1), None


def with_supported(load: Callable[[str], Any]) -> Any:
    """`load(name)` with our attention, or the library's where unsupported (Gemma 2, gpt-oss)."""
    for name in (NAME, "sdpa", "eager"):
        try:
            return load(name)
        except (KeyError, ValueError) as error:
            unsupported = error
    raise unsupported


def needs_mask(config: Any, lengths: Sequence[int], weight: torch.Tensor) -> bool:
    """Whether attention to a packed row reads the mask; `weight` is any of the model's.

    transformers would build one for nothing, a byte for each pair of tokens (1 GiB for 32,768), and
    synchronize with the device.
    """
    if config._attn_implementation != NAME:
        return True
    window = getattr(config, "sliding_window", None)
    if window is None or max(lengths) <= window:
        return False
    if getattr(config, "attention_dropout", 0):  # as in `attend`
        return True
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return not has_kernel(weight.device, precision.matmul_dtype(weight), size, size)


def has_kernel(device: torch.device, dtype: torch.dtype, size: int, value_size: int) -> bool:
    """Whether torch's flash-attention kernel supports these head sizes, without dropout.

    Source: torch 2.13, aten/src/ATen/native/transformers/cuda: flash_attn/flash_api.cpp,
    `mha_varlen_fwd`; sdp_utils.cpp, `check_flash_attention_hardware_support`.
    """
    fits = size == value_size and size % 8 == 0 and size <= 256
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or not fits:
        return False
    return (8, 0) <= torch.cuda.get_device_capability(device) <= (12, 1)


def flash_attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    lengths: Sequence[int],
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention inside each conversation, in one kernel call: fp16 or bf16, as `query`.

    `query`, `key` and `value` are [tokens, heads, head size]; adjacent heads share a key-value
    head. `window` is a number of tokens, the token itself included; None is unlimited.
    """
    offsets = cumulative_lengths(tuple(lengths), query.device)
    positions = (offsets, offsets, max(lengths), max(lengths))
    window_size = (window - 1 if window else -1, 0)  # other tokens to the left and to the right
    options: Any = {"scale": scaling, "window_size": window_size, "enable_gqa": True}
    return cast(torch.Tensor, varlen_attn(query, key, value, *positions, **options))


@lru_cache(maxsize=1)  # the same in every layer: one copy to the device a step
def cumulative_lengths(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Start of each conversation, and the end of the last: int32 [conversations + 1]."""
    with torch.inference_mode(False):  # training uses a tensor cached by scoring
        return to_device(np.array([*accumulate(lengths, initial=0)], dtype=np.int32), device)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
