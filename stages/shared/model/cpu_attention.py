"""Causal attention as batched matmuls, for a CPU.

torch's CPU kernel reaches an eighth of the machine's matmul rate in its backward pass. Here queries
are blocked, each block against the keys up to its end, so that little is computed above the
diagonal; heads that share keys are one matmul, conversations of about the same length one batch.
Scores and softmax are in fp32 (in bf16, gradients are a quarter noisier), and recomputed in the
backward pass instead of saved.

    P = softmax(s·Q·Kᵀ),  O = P·V
    ∂V = Pᵀ·∂O,  ∂P = ∂O·Vᵀ,  ∂S = P∘(∂P − Σ P∘∂P),  ∂Q = s·∂S·K,  ∂K = s·∂Sᵀ·Q

Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; blocks, recomputation: Dao et al. 2022,
FlashAttention, arXiv:2205.14135, appendix B.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise, starmap
from typing import Any

import torch

from stages.shared.weights.precision import exact_matmuls

SCORES_BYTES = 16 * 2**20  # fp32 scores of one block
MOST_QUERIES = 192  # of a block: larger ones compute too much above the diagonal
LANES = 16  # fp32 elements of a CPU vector; a softmax of 61 takes as long as one of 90
# Padding is worth its cost, for fewer and larger matmuls, up to 128² pairs of tokens.
PADDING_TOKENS = 128


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    lengths: Sequence[int],
) -> torch.Tensor:
    """Causal attention inside each conversation: [tokens, heads, head size], as `query`.

    `key` and `value` may have fewer heads: adjacent heads of `query` share one.
    """
    return _Attention.apply(query, key, value, scaling, tuple(lengths))


@dataclass(frozen=True)
class LengthGroup:
    """Adjacent conversations of a packed row of similar length, padded to one length."""

    span: slice  # of the row, in tokens
    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        """Padded length in tokens; a single conversation is not padded."""
        longest = max(self.lengths)
        return longest if len(self.lengths) == 1 else -(-longest // LANES) * LANES

    @cached_property
    def _positions(self) -> torch.Tensor:
        """Padded position of each token: int64 [tokens]."""
        each = (torch.arange(n) + i * self.length for i, n in enumerate(self.lengths))
        return torch.cat([*each])

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """From a row [tokens, ...] to [conversations, length, ...], padded with zeros."""
        own, count = row[self.span], len(self.lengths)
        if count == 1:
            return own[None]
        padded = own.new_zeros(count * self.length, *own.shape[1:])
        return padded.index_copy_(0, self._positions, own).unflatten(0, (count, -1))

    def scatter(self, padded: torch.Tensor, row: torch.Tensor) -> None:
        """Write padded values back into a row."""
        flat = padded.flatten(0, 1)
        row[self.span] = flat if len(padded) == 1 else flat.index_select(0, self._positions)


@lru_cache(maxsize=4)  # the same in all layers of a step
def length_groups(lengths: tuple[int, ...]) -> tuple[LengthGroup, ...]:
    """Group the conversations of a row, which `packing.bins` orders by length."""
    groups: list[list[int]] = []
    padding = 0
    for length in lengths:
        padding += abs(groups[-1][0] ** 2 - length**2) if groups else 0
        if groups and padding < PADDING_TOKENS**2:
            groups[-1].append(length)
        else:
            groups.append([length])
            padding = 0
    spans = starmap(slice, pairwise(accumulate(map(sum, groups), initial=0)))
    return tuple(map(LengthGroup, spans, map(tuple, groups)))


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
        for group in length_groups(lengths):  # a name would keep a workspace alive beyond the next
            group.scatter(_Workspace((query, key, value), scaling, group).forward(), result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        for group in length_groups(ctx.lengths):
            work = _Workspace(inputs, ctx.scaling, group)
            for part, whole in zip(work.backward(group.gather(gradient)), gradients, strict=True):
                group.scatter(part, whole)
            del work
        return *gradients, None, None


class _Workspace:
    """Inputs of a length group in matmul layout, and a buffer for the scores of each block.

    `query` is [conversations · key-value heads, length · heads that share one, head size]; `key`
    and `value` are [conversations · key-value heads, length, head size]. Fresh pages for scores
    would cost as much as a matmul.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], scaling: float, group: LengthGroup) -> None:
        heads, self.key_heads = (x.shape[1] for x in inputs[:2])
        self.sharing, self.length, self.scaling = heads // self.key_heads, group.length, scaling
        rows = heads * len(group.lengths) * self.length  # of scores for one query of each
        self.size = min(self.length, MOST_QUERIES, max(1, SCORES_BYTES // (4 * rows)))
        self.query, self.key, self.value = (self.by_key_head(group.gather(x)) for x in inputs)
        self._query32 = self.query.float()
        self._key32 = self.key.transpose(1, 2).contiguous().float()
        self._scores = self._query32.new_empty(rows * self.size)
        self._low = self.query.new_empty(rows * self.size)
        # For a block's own keys; padding comes after all tokens, so this masks it too.
        self._causal = self._query32.new_full((self.size, 1, self.size), -torch.inf)
        self._causal[:, 0].triu_(1)

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Rows of `query` and the number of keys they attend to."""
        for start in range(0, self.length, self.size):
            end = min(start + self.size, self.length)
            yield slice(start * self.sharing, end * self.sharing), end

    def by_key_head(self, padded: torch.Tensor) -> torch.Tensor:
        """[conversations, length, heads, size] to the layout of `query`."""
        by_key = padded.unflatten(2, (self.key_heads, -1)).transpose(1, 2)
        return by_key.reshape(-1, by_key.shape[2] * by_key.shape[3], padded.shape[-1])

    def by_head(self, rows: torch.Tensor) -> torch.Tensor:
        """Inverse of `by_key_head`."""
        sharing = rows.shape[1] // self.length
        by_key = rows.view(-1, self.key_heads, self.length, sharing, rows.shape[-1])
        return by_key.transpose(1, 2).flatten(2, 3)

    def probabilities(self, rows: slice, end: int) -> torch.Tensor:
        """P of these rows over the first `end` keys, fp32."""
        query, key = self._query32[:, rows], self._key32[..., :end]
        scores = _view(self._scores, (*query.shape[:2], end))
        with exact_matmuls(self.query.dtype):
            torch.baddbmm(scores, query, key, beta=0, alpha=self.scaling, out=scores)
        own = end - rows.start // self.sharing
        square = scores.unflatten(1, (own, self.sharing))[..., end - own :]
        square += self._causal[:own, :, :own]
        return torch.softmax(scores, dim=-1, out=scores)

    def cast(self, scores: torch.Tensor) -> torch.Tensor:
        """Copy in the dtype of the inputs."""
        return _view(self._low, scores.shape).copy_(scores)

    def forward(self) -> torch.Tensor:
        """O, [conversations, length, heads, size]."""
        result = torch.empty_like(self.query)
        for rows, end in self.blocks():
            p = self.cast(self.probabilities(rows, end))
            result[:, rows] = torch.bmm(p, self.value[:, :end])
        return self.by_head(result)

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """∂Q, and ∂K and ∂V in fp32, from ∂O."""
        dresult, values = self.by_key_head(gradient), self.value.transpose(1, 2)
        dquery = torch.empty_like(self.query)
        dkey = torch.zeros(self.key.shape, dtype=torch.float32, device=gradient.device)
        dvalue = torch.zeros_like(dkey)
        buffer = torch.empty_like(self._scores)
        for rows, end in self.blocks():
            p = self.probabilities(rows, end)
            low = self.cast(p)
            dvalue[:, :end] += torch.bmm(low.transpose(1, 2), dresult[:, rows])
            dp = torch.bmm(dresult[:, rows], values[..., :end], out=low)
            dscores = _view(buffer, p.shape).copy_(dp)  # ∂P, then ∂S
            torch.ops.aten._softmax_backward_data.out(
                dscores, p, -1, torch.float32, grad_input=dscores
            )
            dscores = self.cast(dscores)
            dquery[:, rows] = torch.bmm(dscores, self.key[:, :end])
            dkey[:, :end] += torch.bmm(dscores.transpose(1, 2), self.query[:, rows])
        gradients = (dquery.mul_(self.scaling), dkey.mul_(self.scaling), dvalue)
        return tuple(map(self.by_head, gradients))


def _view(buffer: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return buffer[: math.prod(shape)].view(*shape)
