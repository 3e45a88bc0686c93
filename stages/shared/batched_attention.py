"""Causal attention as batched matrix products, for a CPU.

torch's own kernel for a CPU reaches an eighth of the machine's matrix rate in its backward pass.
Here queries are taken in blocks, each against the keys up to its end, so that little of what
causality shuts out is computed; heads that share keys are one product, and so are conversations
that fit into one block together. Scores and their softmax are in fp32 whatever the inputs are in
(rounded to bf16 before the softmax they made gradients a quarter noisier), and are computed again
in the backward pass: none is kept, whatever the length.

    P = softmax(s·Q·Kᵀ),  O = P·V
    ∂V = Pᵀ·∂O,  ∂P = ∂O·Vᵀ,  ∂S = P∘(∂P − Σ P∘∂P),  ∂Q = s·∂S·K,  ∂K = s·∂Sᵀ·Q

Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; for the blocks and what is computed
again, Dao et al. 2022, FlashAttention, arXiv:2205.14135, appendix B.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch

# Of the scores of one block, in fp32; and the most queries in it, beyond which too much of the
# triangle is computed in vain.
SCORES_BYTES = 16 * 2**20
MOST_QUERIES = 128


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    lengths: Sequence[int],
) -> torch.Tensor:
    """Attention of every token to itself and those of its conversation before it.

    Args:
        query: [heads, tokens, head size].
        key: [key-value heads, tokens, head size]; heads that follow each other share one.
        value: as `key`.
        scaling: s.
        lengths: of conversations, one behind the other, in tokens.

    Returns:
        [heads, tokens, head size], in the dtype of `value`; in memory token by token.
    """
    return _Attention.apply(query, key, value, scaling, tuple(lengths))


def spans(lengths: Sequence[int]) -> Iterator[tuple[slice, list[int]]]:
    """Where conversations stand that are computed together: as many as fit into one block."""
    start, together = 0, list[int]()
    for length in lengths:
        if together and sum(together) + length > MOST_QUERIES:
            yield slice(start, start + sum(together)), together
            start, together = start + sum(together), []
        together.append(length)
    yield slice(start, start + sum(together)), together


def queries_of_block(heads: int, tokens: int) -> int:
    """How many queries of a conversation of so many tokens are taken at once."""
    return min(tokens, MOST_QUERIES, max(1, SCORES_BYTES // (4 * heads * tokens)))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scaling, ctx.lengths = scaling, lengths
        result = _by_token(query)
        for span, together in spans(lengths):  # a workspace has no name: it goes before the next
            q, k, v = query[:, span], key[:, span], value[:, span]
            result[:, span] = _Workspace(q, k, scaling, together).results(v)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        dquery, dkey, dvalue = map(_by_token, (query, key, value))
        for span, together in spans(ctx.lengths):
            q, k, v = query[:, span], key[:, span], value[:, span]
            dquery[:, span], dkey[:, span], dvalue[:, span] = _Workspace(
                q, k, ctx.scaling, together
            ).gradients(v, gradient[:, span])
        return dquery, dkey, dvalue, None, None


def _by_token(like: torch.Tensor) -> torch.Tensor:
    """Room for [heads, tokens, size] that lies token by token, as linear layers want it."""
    heads, tokens, size = like.shape
    return like.new_empty(tokens, heads, size).transpose(0, 1)


class _Workspace:
    """Queries in the order that products want, and room for the scores of one block.

    The room is used again for the next block: fresh pages cost as much as a product.

    Attributes:
        asked: [key-value heads, tokens · heads that share one, head size].
    """

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, scaling: float, lengths: Sequence[int]
    ) -> None:
        heads, self.tokens = query.shape[:2]
        self.sharing = heads // len(key)
        alone = len(lengths) == 1
        self.size = queries_of_block(heads, self.tokens) if alone else self.tokens
        self.scaling = scaling
        self.key = key
        self.asked = self.grouped(query)
        self._wide = self.asked.float()
        self._keys = key.float().transpose(1, 2)
        self._scores = self._wide.new_empty(heads * self.size * self.tokens)
        self._low = query.new_empty(len(self._scores))
        # Of the square of a block's own keys, what lies above the diagonal is still to come.
        self._hidden = self._wide.new_full((self.size, 1, self.size), -torch.inf)
        self._hidden[:, 0].triu_(1)
        for end in accumulate(lengths[:-1]):  # and what lies left of this is another conversation
            self._hidden[end:, 0, :end] = -torch.inf

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Rows of `asked`, and how many keys they may look at."""
        for start in range(0, self.tokens, self.size):
            end = min(start + self.size, self.tokens)
            yield slice(start * self.sharing, end * self.sharing), end

    def grouped(self, heads: torch.Tensor) -> torch.Tensor:
        """[heads, tokens, size] as [key-value heads, tokens · heads that share one, size]."""
        shared = heads.unflatten(0, (-1, self.sharing)).transpose(1, 2)
        return shared.reshape(len(shared), -1, heads.shape[-1])

    def ungrouped(self, rows: torch.Tensor) -> torch.Tensor:
        """The way back."""
        return rows.unflatten(1, (-1, self.sharing)).transpose(1, 2).flatten(0, 1)

    def probabilities(self, rows: slice, end: int) -> torch.Tensor:
        """P of these rows over the first `end` keys, in fp32."""
        asked, keys = self._wide[:, rows], self._keys[..., :end]
        scores = _view(self._scores, (*asked.shape[:2], end))
        torch.baddbmm(scores, asked, keys, beta=0, alpha=self.scaling, out=scores)
        own = end - rows.start // self.sharing
        square = scores.unflatten(1, (own, self.sharing))[..., end - own :]
        square += self._hidden[:own, :, :own]
        return torch.softmax(scores, dim=-1, out=scores)

    def halved(self, scores: torch.Tensor) -> torch.Tensor:
        """A copy in the dtype of the inputs."""
        return _view(self._low, scores.shape).copy_(scores)

    def results(self, value: torch.Tensor) -> torch.Tensor:
        """O."""
        found = torch.empty_like(self.asked)
        for rows, end in self.blocks():
            seen = self.halved(self.probabilities(rows, end))
            found[:, rows] = torch.bmm(seen, value[:, :end])
        return self.ungrouped(found)

    def gradients(self, value: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """∂Q, ∂K and ∂V for a gradient ∂O, the last two in fp32."""
        dresult, values = self.grouped(gradient), value.transpose(1, 2)
        dquery = torch.empty_like(self.asked)
        dkey = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
        dvalue = torch.zeros_like(dkey)
        room = torch.empty_like(self._scores)
        for rows, end in self.blocks():
            seen = self.probabilities(rows, end)
            low = self.halved(seen)
            dvalue[:, :end] += torch.bmm(low.transpose(1, 2), dresult[:, rows])
            dseen = torch.bmm(dresult[:, rows], values[..., :end], out=low)
            dscores = self.halved(_softmax_backward(_view(room, seen.shape).copy_(dseen), seen))
            dquery[:, rows] = torch.bmm(dscores, self.key[:, :end])
            dkey[:, :end] += torch.bmm(dscores.transpose(1, 2), self.asked[:, rows])
        return self.ungrouped(dquery.mul_(self.scaling)), dkey.mul_(self.scaling), dvalue


def _softmax_backward(gradient: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """∂S = P∘(∂P − Σ P∘∂P), in the place of ∂P."""
    return torch.ops.aten._softmax_backward_data.out(
        gradient, result, -1, torch.float32, grad_input=gradient
    )


def _view(room: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return room[: math.prod(shape)].view(*shape)
