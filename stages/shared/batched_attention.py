"""Causal attention as batched matrix products, for a CPU.

torch's own kernel for a CPU reaches an eighth of the machine's matrix rate in its backward pass.
Here queries are taken in blocks, each against the keys up to its end, so that little of what
causality shuts out is computed; heads that share keys are one product, and conversations of about
the same length one batch. Scores and their softmax are in fp32 whatever the inputs are in (rounded
to bf16 before the softmax they made gradients a quarter noisier), and are computed again in the
backward pass: none is kept, whatever the length.

    P = softmax(s·Q·Kᵀ),  O = P·V
    ∂V = Pᵀ·∂O,  ∂P = ∂O·Vᵀ,  ∂S = P∘(∂P − Σ P∘∂P),  ∂Q = s·∂S·K,  ∂K = s·∂Sᵀ·Q

Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; for the blocks and what is computed
again, Dao et al. 2022, FlashAttention, arXiv:2205.14135, appendix B.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stages.shared.alike import Alike, alike
from stages.shared.precision import exact_products

# Of the scores of one block, in fp32; and the most queries in it, beyond which too much of the
# triangle is computed in vain.
SCORES_BYTES = 16 * 2**20
MOST_QUERIES = 192


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    lengths: Sequence[int],
) -> torch.Tensor:
    """Attention of every token to itself and those of its conversation before it.

    Args:
        query: [tokens, heads, head size].
        key: [tokens, key-value heads, head size]; heads that follow each other share one.
        value: as `key`.
        scaling: s.
        lengths: of conversations, one behind the other, in tokens.

    Returns:
        [tokens, heads, head size], in the dtype of `value`.
    """
    return _Attention.apply(query, key, value, scaling, tuple(lengths))


def queries_of_block(heads: int, length: int) -> int:
    """How many queries of conversations of one length are taken at once.

    Args:
        heads: of all conversations together.
        length: of each, in tokens.
    """
    return min(length, MOST_QUERIES, max(1, SCORES_BYTES // (4 * heads * length)))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        lengths: tuple[int, ...],
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scaling, ctx.lengths = scaling, lengths
        result = torch.empty_like(query, memory_format=torch.contiguous_format)
        for some in alike(lengths):  # a workspace has no name: it goes before the next
            some.put(_Workspace(query, key, value, scaling, some).results(), result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        found = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        ]
        for some in alike(ctx.lengths):
            work = _Workspace(query, key, value, ctx.scaling, some)
            for part, whole in zip(work.gradients(some.taken(gradient)), found, strict=True):
                some.put(part, whole)
            del work
        return *found, None, None


class _Workspace:
    """Conversations of one length in the order that products want, and room for scores.

    The room is used again for the next block: fresh pages cost as much as a product.

    Attributes:
        asked: [conversations · key-value heads, length · heads that share one, head size].
        key: [conversations · key-value heads, length, head size].
        value: as `key`.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        some: Alike,
    ) -> None:
        heads, self.shared = query.shape[1], key.shape[1]
        self.sharing, self.length = heads // self.shared, some.length
        self.size = queries_of_block(heads * some.conversations, some.length)
        self.scaling = scaling
        self.asked = self.grouped(some.taken(query))
        self.key, self.value = (self.grouped(some.taken(x)) for x in (key, value))
        self._wide = self.asked.float()
        self._keys = self.key.transpose(1, 2).contiguous().float()
        self._scores = self._wide.new_empty(heads * some.conversations * self.size * self.length)
        self._low = query.new_empty(len(self._scores))
        # Of the square of a block's own keys, what lies above the diagonal is still to come. What
        # pads a conversation comes after all of it.
        self._hidden = self._wide.new_full((self.size, 1, self.size), -torch.inf)
        self._hidden[:, 0].triu_(1)

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Rows of `asked`, and how many keys they may look at."""
        for start in range(0, self.length, self.size):
            end = min(start + self.size, self.length)
            yield slice(start * self.sharing, end * self.sharing), end

    def grouped(self, taken: torch.Tensor) -> torch.Tensor:
        """[conversations, length, heads, size] with heads that share keys behind each other."""
        by_key = taken.unflatten(2, (self.shared, -1)).transpose(1, 2)
        return by_key.reshape(-1, by_key.shape[2] * by_key.shape[3], taken.shape[-1])

    def ungrouped(self, rows: torch.Tensor) -> torch.Tensor:
        """The way back."""
        by_key = rows.view(
            -1, self.shared, self.length, rows.shape[1] // self.length, rows.shape[-1]
        )
        return by_key.transpose(1, 2).flatten(2, 3)

    def probabilities(self, rows: slice, end: int) -> torch.Tensor:
        """P of these rows over the first `end` keys, in fp32."""
        asked, keys = self._wide[:, rows], self._keys[..., :end]
        scores = _view(self._scores, (*asked.shape[:2], end))
        with exact_products(self.asked.dtype):
            torch.baddbmm(scores, asked, keys, beta=0, alpha=self.scaling, out=scores)
        own = end - rows.start // self.sharing
        square = scores.unflatten(1, (own, self.sharing))[..., end - own :]
        square += self._hidden[:own, :, :own]
        return torch.softmax(scores, dim=-1, out=scores)

    def halved(self, scores: torch.Tensor) -> torch.Tensor:
        """A copy in the dtype of the inputs."""
        return _view(self._low, scores.shape).copy_(scores)

    def results(self) -> torch.Tensor:
        """O, [conversations, length, heads, size]."""
        found = torch.empty_like(self.asked)
        for rows, end in self.blocks():
            seen = self.halved(self.probabilities(rows, end))
            found[:, rows] = torch.bmm(seen, self.value[:, :end])
        return self.ungrouped(found)

    def gradients(self, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """∂Q, ∂K and ∂V for a gradient ∂O, the last two in fp32."""
        dresult, values = self.grouped(gradient), self.value.transpose(1, 2)
        dquery = torch.empty_like(self.asked)
        dkey = torch.zeros(self.key.shape, dtype=torch.float32, device=gradient.device)
        dvalue = torch.zeros_like(dkey)
        buffer = torch.empty_like(self._scores)
        for rows, end in self.blocks():
            seen = self.probabilities(rows, end)
            low = self.halved(seen)
            dvalue[:, :end] += torch.bmm(low.transpose(1, 2), dresult[:, rows])
            dseen = torch.bmm(dresult[:, rows], values[..., :end], out=low)
            dscores = self.halved(_softmax_backward(_view(buffer, seen.shape).copy_(dseen), seen))
            dquery[:, rows] = torch.bmm(dscores, self.key[:, :end])
            dkey[:, :end] += torch.bmm(dscores.transpose(1, 2), self.asked[:, rows])
        found = dquery.mul_(self.scaling), dkey.mul_(self.scaling), dvalue
        return tuple(map(self.ungrouped, found))


def _softmax_backward(gradient: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """∂S = P∘(∂P − Σ P∘∂P), in the place of ∂P."""
    return torch.ops.aten._softmax_backward_data.out(
        gradient, result, -1, torch.float32, grad_input=gradient
    )


def _view(buffer: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return buffer[: math.prod(shape)].view(*shape)
