"""Attention inside each conversation of a packed row, without what lies between them.

The mask that transformers makes for a packed row is right, but everything it shuts out is computed
first: of 16 conversations of 50 tokens, fifteen parts in sixteen. Here a GPU is told where
conversations end; a CPU computes batched products. What neither covers is the library's own
attention, called once a conversation. That goes by the mask where it is not told the lengths (in
generation), or where a layer looks back less far than the longest of them (a sliding window).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.shared import batched_attention, precision, varlen_attention

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
    """An attention function of transformers.

    Args:
        module: the attention layer.
        query: [batch, heads, tokens, head size].
        key: [batch, key-value heads, tokens, head size].
        value: as `key`.
        attention_mask: bool [batch, 1, tokens, tokens], or None for plain causal attention.
        conversation_lengths: of a packed row (batch 1), in tokens.
        kwargs: for `sdpa_attention_forward`.

    Returns:
        [batch, tokens, heads, head size], and no attention weights.
    """
    lengths, window = conversation_lengths, kwargs.get("sliding_window")
    windowed = bool(lengths and window and max(lengths) > window)
    if lengths and not kwargs.get("dropout"):
        dtype = precision.of_products(query)  # as autocast would have it for the library's own
        # An index would copy the gradient, into zeros.
        q, k, v = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
        scaling = kwargs["scaling"]
        if varlen_attention.covers(q.device, dtype, q.shape[-1], v.shape[-1]):
            return varlen_attention.attend(q, k, v, scaling, lengths, window)[None], None
        if q.device.type == "cpu" and not windowed:
            return batched_attention.attend(q, k, v, scaling, lengths)[None], None
    if not lengths or windowed:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = [
        sdpa_attention_forward(
            module,
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            None,
            **kwargs,
        )[0]
        for start, end in pairwise(accumulate(lengths, initial=0))
    ]
    return torch.cat(parts, dim=1), None


def needs_mask(config: Any, lengths: Sequence[int], weight: torch.Tensor) -> bool:
    """Whether attention to a packed row goes by its mask.

    transformers makes one that nobody looks at, unless it is told not to: a byte for each pair of
    tokens, a GiB at 32,768; and it waits for the device first.

    Args:
        config: of the decoder.
        lengths: of the row's conversations, in tokens.
        weight: one of the model's.
    """
    if config._attn_implementation != NAME:
        return True
    window = getattr(config, "sliding_window", None)
    if window is None or max(lengths) <= window:
        return False
    if getattr(config, "attention_dropout", 0):  # no kernel drops out, see `attend`
        return True
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = precision.of_products(weight)
    return not varlen_attention.covers(weight.device, dtype, size, size)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
