"""Memory by formula: the instants of a block whose functions are fused, and of attention.

What stands at each is written down from stages/shared/step/fused and from
`stages.shared.model.cpu_attention`; names and letters are those of `stages.shared.blocks`.
"""

from dataclasses import dataclass

from stages.shared.blocks import Block, Flow, Saved
from stages.shared.instants import Instant
from stages.shared.model.cpu_attention import block_queries


def forward(saved: Saved, workspace: int) -> list[Instant]:
    """At the product down, of silu(gate)·up, which wants its matrix: c·(f + h) beside it.

    Args:
        saved: of the block.
        workspace: bytes of its largest matrix, dequantized; 0 where it need not be.
    """
    block, c = saved.block, saved.flow.compute
    work = workspace + _factors(saved)
    return [Instant(saved.total, c * (block.inner + block.hidden), work)]


def first_forward(saved: Saved, workspace: int) -> list[Instant]:
    """The same of a checkpointed block the first time: what it would save goes at once."""
    block, flow = saved.block, saved.flow
    c, around = flow.compute, 2 * flow.stream * block.hidden
    work = workspace + _factors(saved)
    return [Instant(0, around + c * (3 * block.inner + block.hidden), work)]


def backward(saved: Saved, workspace: int) -> list[Instant]:
    """At the widest products and the gradients of their adapters, and at the norm.

    On a CPU at the products with the matrices of gate and up: c·2f of their gradients in the place
    of what they were made from, and c·h; and before them at the last gradient of an adapter of
    theirs, c·r·f of it on its way to fp32. On CUDA the gradients are in the place of gate and up:
    at the product down c·f, then at those of gate and up nothing of that width. Then 12·h of the
    norm in fp32, and c·h. What lies between A and B of gate and up, c·2r, has a gradient too. The
    gradients of the adapters of gate, up and down, 4·3·r·(h + f), stand until all are returned.
    """
    block, flow = saved.block, saved.flow
    c, r, h, f = flow.compute, flow.rank, block.hidden, block.inner
    gradient = flow.stream * h + c * 2 * r
    adapters = _factors(saved) + 4 * 3 * r * (h + f)
    if flow.kernel:
        return [
            Instant(saved.total, gradient - c * r + c * f + c * h, workspace),
            Instant(saved.total, gradient + c * h, workspace + adapters),
            Instant(saved.total, gradient + 12 * h + c * h, adapters),
        ]
    products = gradient + c * 2 * f + c * h
    return [
        Instant(saved.total, products, workspace + adapters),
        Instant(saved.total, products, adapters + c * r * f),
        Instant(saved.total, gradient + 12 * h + c * h, adapters),
    ]


def _factors(saved: Saved) -> int:
    """c·3·r·(h + f): the adapters of gate, up and down, as products want them; not where they stay.

    In fp32 2·r·h, the A of gate and up as one matrix; the rest is multiplied with as it is.
    """
    block, flow = saved.block, saved.flow
    if flow.kernel:  # see `workspace.block_copies_bytes`
        return 0
    if flow.compute == 4:
        return 4 * 2 * flow.rank * block.hidden
    return flow.compute * 3 * flow.rank * (block.hidden + block.inner)


@dataclass(frozen=True)
class Attention:
    """Attention as batched products.

    Attributes:
        saved: of the block.
        conversations: B that are computed together.
        length: what they are padded to, in tokens; T are all of them.
    """

    saved: Saved
    conversations: int
    length: int

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
    def _tokens(self) -> int:
        return self.conversations * self.length

    @property
    def _queries(self) -> int:
        """n, of each conversation at a time."""
        return block_queries(self._block.heads * self.conversations, self.length)

    @property
    def _scores(self) -> int:
        """Elements of one block of scores: a·n·T."""
        return self._block.heads * self._queries * self._tokens

    @property
    def _regrouped(self) -> int:
        """c·q, of queries in the order of their groups, where heads share keys or rows do."""
        block = self._block
        moved = block.query > block.key_value or self.conversations > 1
        return self._flow.compute * block.query if moved else 0

    @property
    def _padded(self) -> int:
        """2·c·kv, of keys and values where there are several conversations."""
        return 2 * self._flow.compute * self._block.key_value if self.conversations > 1 else 0

    @property
    def workspace_bytes(self) -> int:
        """T·(c·q + 2·c·kv + 4q + 4kv) of copies; (4 + c)·a·n·T of scores; 4·n²."""
        block, c = self._block, self._flow.compute
        wide = 4 * block.key_value + (4 * block.query if c < 4 else 0)
        scores = (4 + c) * self._scores + 4 * self._queries**2
        return self._tokens * (self._regrouped + self._padded + wide) + scores

    def forward(self) -> Instant:
        """c·q a token of the result; of those together, in the order of groups and in its own."""
        block, flow = self._block, self._flow
        around = 0 if flow.fused else 2 * flow.stream * block.hidden
        extra = around + flow.compute * block.query
        return Instant(self._kept, extra, self.workspace_bytes + self._of_result)

    @property
    def _of_result(self) -> int:
        return self._tokens * self._flow.compute * self._block.query + self._on_its_way()

    def _on_its_way(self, keys: int = 0) -> int:
        """What becomes part of a result: the larger of a product, and the result in its own order.

        c·q·B·n of a block's queries, or as much as is given of keys; then c·q·T, where heads share
        keys and groups have another order.
        """
        block, c = self._block, self._flow.compute
        product = block.query * self.conversations * self._queries
        ordered = block.query * self._tokens if block.query > block.key_value else 0
        return c * max(product, keys, ordered)

    def without_gradients(self) -> Instant:
        """The same where nothing is kept: residual, normed input, queries, keys, values stand."""
        block, flow = self._block, self._flow
        held = 2 * flow.stream * block.hidden + 2 * flow.compute * (block.query + block.key_value)
        return Instant(0, held, self.workspace_bytes + self._of_result)

    def backward(self) -> Instant:
        """c·(2q + 2kv) a token of gradients that come and go; those of a group, and its scores'.

        T·c·2q of a group's gradients, of the result and of queries (of several conversations c·q
        more, that of the result padded), 8·kv·T of keys' and values' in fp32, 4·a·n·T of the
        scores'; and what is on its way there.
        """
        block, flow = self._block, self._flow
        c = flow.compute
        extra = flow.stream * block.hidden + c * (2 * block.query + 2 * block.key_value)
        padded = c * block.query if self.conversations > 1 else 0
        group = padded + self._regrouped + c * block.query + 8 * block.key_value
        arriving = self._on_its_way(block.key_value * self._tokens)
        room = self.workspace_bytes + self._tokens * group + 4 * self._scores + arriving
        return Instant(self._kept, extra, room)
