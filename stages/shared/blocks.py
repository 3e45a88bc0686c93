"""Memory by formula: the activations of one block of a decoder, a term a function.

The block is that of Llama, Mistral, Qwen2 and Qwen3 as transformers builds it: root-mean-square
norm, attention with rotary positions, norm, gated feed-forward. The terms describe the modules that
run, line by line, and the fused functions that training puts in their place where it can.

Widths are numbers of elements a token: h of the residual stream, q of all query heads together, kv
of all key (or value) heads, f of the feed-forward; a heads, r the adapter's rank. s and c are bytes
an element, of the residual stream and of what a matrix product returns. Results are in bytes a
token.
"""

from dataclasses import dataclass
from functools import cached_property

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Block:
    """Widths of a block, in elements a token, and its attention heads.

    `head_norms`: whether queries and keys are normed, head by head, as in Qwen3.
    """

    hidden: int
    query: int
    key_value: int
    inner: int
    heads: int
    head_norms: bool = False

    @property
    def largest_matrix(self) -> int:
        """Elements of each matrix of the feed-forward."""
        return self.hidden * self.inner


@dataclass(frozen=True)
class Flow:
    """What numbers are in as they pass through a block, and what is kept for its backward pass.

    Attributes:
        stream: s, bytes an element of the residual stream.
        compute: c, bytes an element that a matrix product returns.
        trained: whether the block's own matrices and norms are trained (full fine-tuning).
        rank: r, of the adapter; 0 without.
        adapted: names of the layers that have an adapter, of `LINEAR`.
        widened: whether an adapter casts its input to fp32, and autocast back. peft does so for
            dense layers, and, since it asks for CUDA's autocast alone, for quantized ones on a CPU.
        keeps_input: whether the product below an adapter keeps its input too, as int8's does.
        dropout: bytes an element of an adapter's input that its dropout keeps; 0 without.
        fused: whether the functions of stages/shared/step/fused run in the modules' place.
        kernel: whether attention is torch's kernel, as on CUDA, or batched products.
    """

    stream: int
    compute: int
    trained: bool = False
    rank: int = 0
    adapted: frozenset[str] = frozenset()
    widened: bool = False
    keeps_input: bool = False
    dropout: int = 0
    fused: bool = False
    kernel: bool = True

    @property
    def copies(self) -> bool:
        """Whether each adapter keeps an input of its own, in the compute dtype."""
        return self.widened or self.dropout > 0

    def adapters(self, *names: str) -> int:
        """How many of these layers have an adapter."""
        return len(self.adapted.intersection(names))


@dataclass(frozen=True)
class Saved:
    """What a block keeps from its forward to its backward pass, in bytes a token, by part."""

    block: Block
    flow: Flow

    @property
    def norm(self) -> int:
        """4·h + 4: the input in fp32 and the reciprocal root; s·h more, the result, if trained.

        Where the stream is fp32 the input is the residual itself. Fused, it always is: s·h + 4.

        Source: transformers 5.23, `LlamaRMSNorm.forward`.
        """
        return self._norm(self.block.hidden, 1, self.flow.stream)

    @property
    def head_norms(self) -> int:
        """The same for queries and keys, a root a head: 4·(q + kv) + 4·a·(1 + kv/q)."""
        block, c = self.block, self.flow.compute
        if not block.head_norms:
            return 0
        key_heads = block.heads * block.key_value // block.query
        return self._norm(block.query, block.heads, c) + self._norm(block.key_value, key_heads, c)

    def _norm(self, width: int, roots: int, result: int) -> int:
        kept = result if self.flow.fused else 4
        return kept * width + 4 * roots + (result * width if self.flow.trained else 0)

    def inputs(self, width: int, *names: str) -> int:
        """Of linear layers that share one input from the residual stream.

        s·width for all of them where an adapter, a trained matrix or an int8 product needs it as
        it is; c·width for each that autocast, or its adapter, makes a copy for. Fused, nothing: the
        norm is computed again from what it keeps.

        Sources: peft 0.21.2, `Linear.forward` and `Linear4bit.forward` of peft/tuners/lora;
        bitsandbytes 0.50.2, `MatMul8bitFp.forward`.
        """
        flow = self.flow
        if flow.fused:
            return 0
        shared, own = flow.stream * width, flow.compute * width
        if flow.trained:
            return own * len(names) if flow.compute < flow.stream else shared
        return self._of_adapters(shared, own, *names)

    def product_input(self, width: int, name: str, *, kept: bool = False) -> int:
        """Of a linear layer whose input is no stream but a result, in the compute dtype.

        Args:
            width: of the input.
            name: of the layer.
            kept: whether what made the result keeps it as well: it is one tensor.
        """
        own = self.flow.compute * width
        return own if self.flow.trained else self._of_adapters(own, own, name, kept=kept)

    def _of_adapters(self, shared: int, own: int, *names: str, kept: bool = False) -> int:
        flow = self.flow
        kept = kept or flow.keeps_input
        if flow.copies:
            return own * flow.adapters(*names) + (shared if kept else 0)
        return shared if flow.adapters(*names) or kept else 0

    def adapters(self, width: int, *names: str) -> int:
        """c·r for each: what lies between its two matrices; and what dropout keeps of its input.

        On a CPU torch's dropout keeps the factors that it multiplied with, on CUDA a byte each.

        Source: torch 2.13, aten/src/ATen/native/Dropout.cpp.
        """
        flow = self.flow
        return flow.adapters(*names) * (flow.compute * flow.rank + flow.dropout * width)

    @property
    def attention(self) -> int:
        """c·(q + 2kv): rotated queries and keys, and values.

        torch's kernel keeps 4·a of logarithms, and its result, which is `product_input` of the
        product after it. No score is kept, whatever the length.

        Source: Dao et al. 2022, FlashAttention, arXiv:2205.14135, algorithm 1 and appendix B.
        """
        block, flow = self.block, self.flow
        logarithms = 4 * block.heads if flow.kernel else 0
        return flow.compute * (block.query + 2 * block.key_value) + logarithms

    @property
    def gate(self) -> int:
        """3·c·f: the gate before and after its activation, and what it is multiplied with.

        Fused, 2·c·f: the activation is computed again.

        Source: Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202, equation 6.
        """
        return (2 if self.flow.fused else 3) * self.flow.compute * self.block.inner

    @property
    def down_input(self) -> int:
        """Of the last product: f wide; fused, computed again from gate and up."""
        return 0 if self.flow.fused else self.product_input(self.block.inner, "down_proj")

    @property
    def kept_by_products(self) -> int:
        """2·s·h + c·(q + f): the inputs that int8 products keep, also where checkpointed.

        They hold them by themselves, out of checkpointing's sight.

        Source: bitsandbytes 0.50.2, `MatMul8bitFp.forward`, `MatMul8bitLt.forward`: `ctx.A`.
        """
        block, flow = self.block, self.flow
        if not flow.keeps_input:
            return 0
        return 2 * flow.stream * block.hidden + flow.compute * (block.query + block.inner)

    @cached_property
    def total(self) -> int:
        """All of it."""
        h, q, f = self.block.hidden, self.block.query, self.block.inner
        return (
            2 * self.norm
            + self.inputs(h, "q_proj", "k_proj", "v_proj")
            + self.head_norms
            + self.attention
            + self.product_input(q, "o_proj", kept=self.flow.kernel)
            + self.inputs(h, "gate_proj", "up_proj")
            + self.gate
            + self.down_input
            + self.adapters(h, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
            + self.adapters(q, "o_proj")
            + self.adapters(f, "down_proj")
        )
