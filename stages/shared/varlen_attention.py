"""Attention of all conversations of a packed row in one call, for a GPU.

torch's flash-attention kernel is told where conversations end, so that no mask is needed, neither
for a sliding window. One call a layer takes the place of one a conversation.

Source: Dao 2023, FlashAttention-2, arXiv:2307.08691; torch 2.13, torch/nn/attention/varlen.py.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import cast

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from stages.shared.transfer import to_device

LARGEST_HEAD = 256  # elements
CAPABILITIES = (8, 0), (12, 1)  # of the first and the last GPU that the kernel is made for


def covers(device: torch.device, dtype: torch.dtype, size: int, value_size: int) -> bool:
    """Whether the kernel computes this, if nothing is dropped out.

    Source: torch 2.13, aten/src/ATen/native/transformers/cuda: flash_attn/flash_api.cpp,
    `mha_varlen_fwd`; sdp_utils.cpp, `check_flash_attention_hardware_support`.

    Args:
        device: of queries, keys and values.
        dtype: of them.
        size: of a query's head, in elements.
        value_size: of a value's.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if size != value_size or size % 8 or size > LARGEST_HEAD:
        return False
    first, last = CAPABILITIES
    return first <= torch.cuda.get_device_capability(device) <= last


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    lengths: Sequence[int],
    window: int | None = None,
) -> torch.Tensor:
    """Attention of every token to itself and those of its conversation before it.

    Args:
        query: fp16 or bf16 [tokens, heads, head size].
        key: [tokens, key-value heads, head size]; heads that follow each other share one.
        value: as `key`.
        scaling: what scores are multiplied with.
        lengths: of conversations, one behind the other, in tokens.
        window: how many tokens, itself included, a token may look at; None for all before it.

    Returns:
        [tokens, heads, head size], in the dtype of the inputs.
    """
    starts = cumulative_lengths(tuple(lengths), query.device)
    longest = max(lengths)
    result = varlen_attn(
        query,
        key,
        value,
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),  # of others, to the left and to the right
        enable_gqa=True,
    )
    return cast(torch.Tensor, result)  # alone, as no logarithms were asked for


@lru_cache(maxsize=1)  # every layer of a step asks for the same: one copy to the device for all
def cumulative_lengths(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where each conversation begins, and where the last one ends: int32 [conversations + 1]."""
    with torch.inference_mode(False):  # what scoring has asked for must serve training too
        return to_device(np.array([*accumulate(lengths, initial=0)], dtype=np.int32), device)
