"""Losses of logits, which become their gradients: read twice, written once.

    loss = ln Σ exp(z) − z[target],  ∂z = softmax(z) − onehot(target)

Source: for the sum in one pass, Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
"""

import torch
import triton
import triton.language as tl

LOGITS, WARPS = 8192, 16  # that a program takes at once


def into_gradients(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
    """Losses [tokens], fp32, of logits [tokens, vocabulary], which become their gradients.

    Args:
        logits: z, contiguous, in the dtype that products run in.
        targets: int64 [tokens].
        losses: room for them, contiguous.
    """
    _into_gradients[(len(logits),)](
        logits, targets, losses, VOCABULARY=logits.shape[1], LOGITS=LOGITS, num_warps=WARPS
    )


@triton.jit
def _into_gradients(
    logits,
    targets,
    losses,
    VOCABULARY: tl.constexpr,  # noqa: N803  (a model has one)
    LOGITS: tl.constexpr,  # noqa: N803
):
    """A program a token; with the largest logit goes the sum of exp(z − largest)."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * VOCABULARY
    target = tl.load(targets + token)
    targeted = tl.load(row + target).to(tl.float32)
    largest = float("-inf")
    total = 0.0
    for start in range(0, VOCABULARY, LOGITS):
        where = start + tl.arange(0, LOGITS)
        z = tl.load(row + where, where < VOCABULARY, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), 0)
    tl.store(losses + token, largest + tl.log(total) - targeted)
    for start in range(0, VOCABULARY, LOGITS):
        where = start + tl.arange(0, LOGITS)
        there = where < VOCABULARY
        z = tl.load(row + where, there, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(z - largest) / total - tl.where(where == target, 1.0, 0.0)
        tl.store(row + where, gradient.to(logits.dtype.element_ty), there)
