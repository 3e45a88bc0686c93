"""Attention inside each conversation of a packed row, without computing across conversations.

The mask that transformers makes for a packed row is right, but everything it hides is computed
first: of 16 conversations of 50 tokens, fifteen parts in sixteen. Here a GPU's flash-attention
kernel is told where conversations end; a CPU computes batched matmuls (`cpu_attention`). Where
neither covers it, the library's own attention is called once a conversation. That goes by the mask
where it is not told the lengths (in generation), or where a layer looks back less far than the
longest of them (a sliding window).

Source: Dao 2023, FlashAttention-2, arXiv:2307.08691; torch 2.13, torch/nn/attention/varlen.py.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
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
LARGEST_HEAD = 256  # elements, that the kernel takes
CAPABILITIES = (8, 0), (12, 1)  # of the first and the last GPU that the kernel is made for


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    conversation_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: [batch, tokens, heads, head size], and no weights.

    Args:
        module: the attention layer.
        query: [batch, heads, tokens, head size].
        key: [batch, key-value heads, tokens, head size].
        value: as `key`.
        attention_mask: bool [batch, 1, tokens, tokens], or None for plain causal attention.
        conversation_lengths: of a packed row (batch 1), in tokens.
        kwargs: for `sdpa_attention_forward`.
    """
    lengths, window = conversation_lengths, kwargs.get("sliding_window")
    windowed = bool(lengths and window and max(lengths) > window)
    if lengths and not kwargs.get("dropout"):
        dtype = precision.matmul_dtype(query)  # as autocast would have it for the library's own
        # An index would copy the gradient, into zeros.
        q, k, v = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
        if has_kernel(q.device, dtype, q.shape[-1], v.shape[-1]):
            return flash_attend(q, k, v, kwargs["scaling"], lengths, window)[None], None
        if q.device.type == "cpu" and not windowed:
            return cpu_attention.attend(q, k, v, kwargs["scaling"], lengths)[None], None
    if not lengths or windowed:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = [
        sdpa_attention_forward(
            module, *(x[:, :, start:end] for x in (query, key, value)), None, **kwargs
        )[0]
        for start, end in pairwise(accumulate(lengths, initial=0))
    ]
    return torch.cat(parts, dim=1), None


def needs_mask(config: Any, lengths: Sequence[int], weight: torch.Tensor) -> bool:
    """Whether attention to a packed row goes by its mask.

    transformers makes a mask unless it is told not to, used or not: a byte for each pair of tokens,
    a GiB at 32,768; and it waits for the device first. `weight` is any of the model's.
    """
    if config._attn_implementation != NAME:
        return True
    window = getattr(config, "sliding_window", None)
    if window is None or max(lengths) <= window:
        return False
    if getattr(config, "attention_dropout", 0):  # no kernel drops out, see `attend`
        return True
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return not has_kernel(weight.device, precision.matmul_dtype(weight), size, size)


def has_kernel(device: torch.device, dtype: torch.dtype, size: int, value_size: int) -> bool:
    """Whether torch's flash-attention kernel takes heads of these sizes, without dropout.

    Source: torch 2.13, aten/src/ATen/native/transformers/cuda: flash_attn/flash_api.cpp,
    `mha_varlen_fwd`; sdp_utils.cpp, `check_flash_attention_hardware_support`.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if size != value_size or size % 8 or size > LARGEST_HEAD:
        return False
    first, last = CAPABILITIES
    return first <= torch.cuda.get_device_capability(device) <= last


def flash_attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    lengths: Sequence[int],
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention inside each conversation: one kernel call for all of a row.

    Args:
        query: fp16 or bf16 [tokens, heads, head size], as the result.
        key: [tokens, key-value heads, head size]; heads that follow each other share one.
        value: as `key`.
        scaling: the factor on the scores.
        lengths: of conversations, in tokens.
        window: how many tokens, itself included, a token may look at; None for all before it.
    """
    offsets = cumulative_lengths(tuple(lengths), query.device)
    longest = max(lengths)
    result = varlen_attn(
        query,
        key,
        value,
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),  # of others, to the left and to the right
        enable_gqa=True,
    )
    return cast(torch.Tensor, result)  # alone, as no logarithms were requested


@lru_cache(maxsize=1)  # every layer of a step has the same: one copy to the device for all
def cumulative_lengths(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where each conversation begins, and where the last one ends: int32 [conversations + 1]."""
    with torch.inference_mode(False):  # a tensor made while scoring must serve training too
        return to_device(np.array([*accumulate(lengths, initial=0)], dtype=np.int32), device)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
