"""Attention inside each conversation of a packed row, computed one conversation at a time.

The mask that transformers makes for a packed row is right, but everything it shuts out is computed
first: of 16 conversations of 50 tokens, fifteen parts in sixteen. Here the library's own attention
is called once a conversation instead; on a CPU, batched products that are faster. Where it is not
told their lengths (in generation), or where a layer looks back less far than the longest of them (a
sliding window), it goes by the mask.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.shared import batched_attention, precision

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
    window = kwargs.get("sliding_window")
    if conversation_lengths is None or (window and max(conversation_lengths) > window):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.device.type == "cpu" and not kwargs.get("dropout"):
        dtype = precision.of_products(query)  # as autocast would have it for the library's own
        q, k, v = (heads.squeeze(0).to(dtype) for heads in (query, key, value))
        result = batched_attention.attend(q, k, v, kwargs["scaling"], conversation_lengths)
        return result.transpose(0, 1)[None], None
    parts = [
        sdpa_attention_forward(
            module,
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            None,
            **kwargs,
        )[0]
        for start, end in pairwise(accumulate(conversation_lengths, initial=0))
    ]
    return torch.cat(parts, dim=1), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
