"""Causal attention as batched matmuls, for a CPU.

torch's own kernel for a CPU reaches an eighth of the machine's matmul rate in its backward pass.
Here queries are taken in blocks, each against the keys up to its end, so that little of what
causality hides is computed; heads that share keys are one matmul, and conversations of about the
same length one batch. Scores and their softmax are in fp32 whatever the inputs are in (rounded to
bf16 before the softmax they made gradients a quarter noisier), and are computed again in the
backward pass: none is saved, whatever the length.

    P = softmax(s·Q·Kᵀ),  O = P·V
    ∂V = Pᵀ·∂O,  ∂P = ∂O·Vᵀ,  ∂S = P∘(∂P − Σ P∘∂P),  ∂Q = s·∂S·K,  ∂K = s·∂Sᵀ·Q

Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; for the blocks and the recomputation, Dao
et al. 2022, FlashAttention, arXiv:2205.14135, appendix B.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from stages.shared.weights.precision import exact_matmuls

# Of the scores of one block, in fp32; and the most queries in it, beyond which too much of the
# triangle is computed in vain.
SCORES_BYTES = 16 * 2**20
MOST_QUERIES = 192
LANES = 16  # fp32 numbers that a CPU takes at once; a softmax of 61 takes as long as one of 90
# Padding that costs as many pairs of tokens as a conversation of so many tokens has is worth it:
# matmuls are fewer and larger.
PADDING_TOKENS = 128


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    lengths: Sequence[int],
) -> torch.Tensor:
    """Causal attention inside each conversation: [tokens, heads, head size].

    Args:
        query: [tokens, heads, head size].
        key: [tokens, key-value heads, head size]; heads that follow each other share one.
        value: as `key`.
        scaling: s.
        lengths: of conversations, in tokens.
    """
    return _Attention.apply(query, key, value, scaling, tuple(lengths))


def block_queries(heads: int, length: int) -> int:
    """Queries of each conversation in one block, for the heads of all conversations together."""
    return min(length, MOST_QUERIES, max(1, SCORES_BYTES // (4 * heads * length)))


@dataclass(frozen=True)
class LengthGroup:
    """Neighbours in a packed row that are about equally long, padded to one length."""

    start: int  # of the first, in tokens
    lengths: tuple[int, ...]

    @property
    def conversations(self) -> int:
        """How many they are."""
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Padded length in tokens; of one conversation alone, its own."""
        longest = max(self.lengths)
        return longest if self.conversations == 1 else -(-longest // LANES) * LANES

    @property
    def span(self) -> slice:
        """Their part of the row."""
        return slice(self.start, self.start + sum(self.lengths))

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """Their values of a row [tokens, ...]: [conversations, length, ...], padded with zeros."""
        own = row[self.span]
        if self.conversations == 1:
            return own[None]
        with_zero = torch.cat([own, own.new_zeros(1, *own.shape[1:])])
        return with_zero.index_select(0, self._sources).unflatten(0, (-1, self.length))

    def scatter(self, padded: torch.Tensor, row: torch.Tensor) -> None:
        """Write padded values back into a row, without the padding."""
        flat = padded.flatten(0, 1)
        row[self.span] = flat if self.conversations == 1 else flat.index_select(0, self._targets)

    @cached_property
    def _targets(self) -> torch.Tensor:
        """The padded position of each token: int64 [their tokens]."""
        positions = [torch.arange(n) + i * self.length for i, n in enumerate(self.lengths)]
        return torch.cat(positions)

    @cached_property
    def _sources(self) -> torch.Tensor:
        """The token at each padded position, or one past them all: int64 [padded tokens]."""
        tokens = len(self._targets)
        sources = torch.full((self.conversations * self.length,), tokens)
        sources[self._targets] = torch.arange(tokens)
        return sources


@lru_cache(maxsize=4)  # all layers of a step have the same
def length_groups(lengths: tuple[int, ...]) -> tuple[LengthGroup, ...]:
    """All conversations of a row, in groups; `packing.bins` orders them by length."""
    groups, padding = list[list[int]](), 0
    for length in lengths:
        padding += abs(groups[-1][0] ** 2 - length**2) if groups else 0
        if groups and padding < PADDING_TOKENS**2:
            groups[-1].append(length)
        else:
            groups.append([length])
            padding = 0
    result, start = list[LengthGroup](), 0
    for group in groups:
        result.append(LengthGroup(start, tuple(group)))
        start += sum(group)
    return tuple(result)


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
        for group in length_groups(lengths):  # a workspace has no name: it goes before the next
            group.scatter(_Workspace(query, key, value, scaling, group).results(), result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = inputs = ctx.saved_tensors
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        for group in length_groups(ctx.lengths):
            work = _Workspace(query, key, value, ctx.scaling, group)
            for part, whole in zip(work.gradients(group.gather(gradient)), gradients, strict=True):
                group.scatter(part, whole)
            del work
        return *gradients, None, None


class _Workspace:
    """Conversations of one length in the order that matmuls want, and a buffer for scores.

    The buffer is used again for the next block: fresh pages cost as much as a matmul.

    Attributes:
        query: [conversations · key-value heads, length · heads that share one, head size].
        key: [conversations · key-value heads, length, head size].
        value: as `key`.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        group: LengthGroup,
    ) -> None:
        heads, self.key_heads = query.shape[1], key.shape[1]
        self.sharing, self.length = heads // self.key_heads, group.length
        self.size = block_queries(heads * group.conversations, group.length)
        self.scaling = scaling
        self.query, self.key, self.value = (
            self.by_key_head(group.gather(x)) for x in (query, key, value)
        )
        self._query32 = self.query.float()
        self._key32 = self.key.transpose(1, 2).contiguous().float()
        scores = heads * group.conversations * self.size * self.length
        self._scores = self._query32.new_empty(scores)
        self._low = query.new_empty(scores)
        # In the square of a block's own keys, those above the diagonal are still to come. What pads
        # a conversation comes after all of it.
        self._causal = self._query32.new_full((self.size, 1, self.size), -torch.inf)
        self._causal[:, 0].triu_(1)

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Rows of `query`, and how many keys they may look at."""
        for start in range(0, self.length, self.size):
            end = min(start + self.size, self.length)
            yield slice(start * self.sharing, end * self.sharing), end

    def by_key_head(self, padded: torch.Tensor) -> torch.Tensor:
        """[conversations, length, heads, size] with heads that share keys behind each other."""
        by_key = padded.unflatten(2, (self.key_heads, -1)).transpose(1, 2)
        return by_key.reshape(-1, by_key.shape[2] * by_key.shape[3], padded.shape[-1])

    def by_head(self, rows: torch.Tensor) -> torch.Tensor:
        """The way back."""
        sharing = rows.shape[1] // self.length
        by_key = rows.view(-1, self.key_heads, self.length, sharing, rows.shape[-1])
        return by_key.transpose(1, 2).flatten(2, 3)

    def probabilities(self, rows: slice, end: int) -> torch.Tensor:
        """P of these rows over the first `end` keys, in fp32."""
        query, key = self._query32[:, rows], self._key32[..., :end]
        scores = _view(self._scores, (*query.shape[:2], end))
        with exact_matmuls(self.query.dtype):
            torch.baddbmm(scores, query, key, beta=0, alpha=self.scaling, out=scores)
        own = end - rows.start // self.sharing
        square = scores.unflatten(1, (own, self.sharing))[..., end - own :]
        square += self._causal[:own, :, :own]
        return torch.softmax(scores, dim=-1, out=scores)

    def lowered(self, scores: torch.Tensor) -> torch.Tensor:
        """A copy in the dtype of the inputs."""
        return _view(self._low, scores.shape).copy_(scores)

    def results(self) -> torch.Tensor:
        """O, [conversations, length, heads, size]."""
        result = torch.empty_like(self.query)
        for rows, end in self.blocks():
            p = self.lowered(self.probabilities(rows, end))
            result[:, rows] = torch.bmm(p, self.value[:, :end])
        return self.by_head(result)

    def gradients(self, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """∂Q, ∂K and ∂V for a gradient ∂O, the last two in fp32."""
        dresult, values = self.by_key_head(gradient), self.value.transpose(1, 2)
        dquery = torch.empty_like(self.query)
        dkey = torch.zeros(self.key.shape, dtype=torch.float32, device=gradient.device)
        dvalue = torch.zeros_like(dkey)
        buffer = torch.empty_like(self._scores)
        for rows, end in self.blocks():
            p = self.probabilities(rows, end)
            low = self.lowered(p)
            dvalue[:, :end] += torch.bmm(low.transpose(1, 2), dresult[:, rows])
            dp = torch.bmm(dresult[:, rows], values[..., :end], out=low)
            dscores = self.lowered(_softmax_backward(_view(buffer, p.shape).copy_(dp), p))
            dquery[:, rows] = torch.bmm(dscores, self.key[:, :end])
            dkey[:, :end] += torch.bmm(dscores.transpose(1, 2), self.query[:, rows])
        return tuple(
            map(self.by_head, (dquery.mul_(self.scaling), dkey.mul_(self.scaling), dvalue))
        )


def _softmax_backward(gradient: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """∂S = P∘(∂P − Σ P∘∂P), in the place of ∂P."""
    return torch.ops.aten._softmax_backward_data.out(
        gradient, result, -1, torch.float32, grad_input=gradient
    )


def _view(buffer: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return buffer[: math.prod(shape)].view(*shape)
