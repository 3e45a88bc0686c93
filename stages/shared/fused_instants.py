"""Memory by formula: the instants of a block whose functions are fused, and of attention.

What stands at each is written down from stages/train/fused and from
`stages.shared.batched_attention`; names and letters are those of `stages.shared.blocks`.
"""

from dataclasses import dataclass

from stages.shared.batched_attention import queries_of_block
from stages.shared.blocks import Block, Flow, Saved
from stages.shared.instants import Instant


def forward(saved: Saved, workspace: int) -> list[Instant]:
    """At silu(gate)·up, and at the product down, which wants its matrix.

    Args:
        saved: of the block.
        workspace: bytes of its largest matrix, dequantized; 0 where it need not be.
    """
    block, c = saved.block, saved.flow.compute
    before_down = saved.total - saved.adapters(block.inner, "down_proj")
    return [
        Instant(before_down, 2 * c * block.inner),
        Instant(saved.total, c * (block.inner + block.hidden), workspace),
    ]


def first_forward(saved: Saved, workspace: int) -> list[Instant]:
    """The same of a checkpointed block the first time: what it would save goes at once."""
    block, flow = saved.block, saved.flow
    c, around = flow.compute, 2 * flow.stream * block.hidden
    return [
        Instant(0, around + 4 * c * block.inner),
        Instant(0, around + c * (3 * block.inner + block.hidden), workspace),
    ]


def backward(saved: Saved, workspace: int) -> list[Instant]:
    """At the product down: the gradients of gate and up are formed while both are there."""
    block, flow = saved.block, saved.flow
    gradient, f = flow.stream * block.hidden, flow.compute * block.inner
    return [
        Instant(saved.total, gradient + 2 * f, workspace),
        Instant(saved.total, gradient + 3 * f),
    ]


@dataclass(frozen=True)
class Attention:
    """Attention as batched products.

    Attributes:
        saved: of the block.
        tokens: T, the most that are computed together: the longest conversation, or several short.
    """

    saved: Saved
    tokens: int

    @property
    def _block(self) -> Block:
        return self.saved.block

    @property
    def _flow(self) -> Flow:
        return self.saved.flow

    @property
    def _kept(self) -> int:
        """What the block has saved up to here."""
        h, saved = self._block.hidden, self.saved
        names = ("q_proj", "k_proj", "v_proj")
        return (
            saved.norm
            + saved.inputs(h, *names)
            + saved.adapters(h, *names)
            + saved.head_norms
            + saved.attention
        )

    @property
    def _scores(self) -> int:
        """Elements of one block of scores: a·n·T, n queries at a time."""
        heads = self._block.heads
        return heads * queries_of_block(heads, self.tokens) * self.tokens

    @property
    def _regrouped(self) -> int:
        """c·q, of queries in the order of their groups, where heads share keys."""
        block = self._block
        return self._flow.compute * block.query if block.query > block.key_value else 0

    @property
    def workspace_bytes(self) -> int:
        """T·(c·q + 4q + 4kv) of regrouped and fp32 copies; (4 + c)·a·n·T of scores; 4·n²."""
        block, c = self._block, self._flow.compute
        copies = 4 * (block.query + block.key_value) if c < 4 else 0
        size = queries_of_block(block.heads, self.tokens)
        return self.tokens * (self._regrouped + copies) + (4 + c) * self._scores + 4 * size**2

    def forward(self) -> Instant:
        """c·q a token of the result, and the same of one span before it is in its place."""
        block, flow = self._block, self._flow
        around = flow.stream * block.hidden
        if not flow.fused:
            around += flow.stream * block.hidden
        extra = around + flow.compute * block.query
        span = flow.compute * block.query * self.tokens
        return Instant(self._kept, extra, self.workspace_bytes + span)

    def without_gradients(self) -> Instant:
        """The same where nothing is kept: residual, normed input, queries, keys, values stand."""
        block, flow = self._block, self._flow
        held = 2 * flow.stream * block.hidden + 2 * flow.compute * (block.query + block.key_value)
        span = flow.compute * block.query * self.tokens
        return Instant(0, held, self.workspace_bytes + span)

    def backward(self) -> Instant:
        """c·(2q + 2kv) a token of gradients that come and go; a span's own, and its scores'.

        T·c·3q of a span's gradients (of the result, of queries, and these in their own order),
        8·kv·T of keys' and values' in fp32, 4·a·n·T of the scores'.
        """
        block, flow = self._block, self._flow
        c = flow.compute
        extra = flow.stream * block.hidden + c * (2 * block.query + 2 * block.key_value)
        span = 2 * self._regrouped + c * block.query + (8 + c) * block.key_value
        room = self.workspace_bytes + self.tokens * span + 4 * self._scores
        return Instant(self._kept, extra, room)
