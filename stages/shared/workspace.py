"""Memory by formula: what a step holds outside its blocks, a term a function.

P is a number of parameters, V the vocabulary, h the hidden size, N the tokens of a micro-batch, S
those of which the loss is taken. Results are in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stages.shared import memory
from stages.shared.model import cpu_attention
from stages.shared.model.cpu_attention import length_groups
from stages.shared.model.packing import Example
from stages.shared.step.fused.cross_entropy import chunk_tokens, fp32_chunk_tokens
from stages.shared.tensors import Model
from stages.shared.tuning import Tuning


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once.

    Attributes:
        tokens: N, of all conversations together.
        supervised: S, those of which the loss is taken.
        together: B conversations, and the length T/B that they are padded to: those whose attention
            is computed together and has the most scores. None if there is only one.
    """

    tokens: int
    supervised: int
    together: tuple[int, int] | None = None

    @property
    def alike(self) -> tuple[int, int]:
        """B and T/B, where there is only one conversation too."""
        return self.together or (1, self.tokens)

    @property
    def longest(self) -> int:
        """No conversation has more tokens."""
        return self.alike[1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """What makes it need more memory than another, whatever is trained."""
        conversations, length = self.alike
        padded = conversations * length
        scores = padded * min(length, cpu_attention.MOST_QUERIES)
        return self.tokens, self.supervised, padded, scores, length

    def outdoes(self, other: "MicroBatch") -> bool:
        """Whether it needs no less than the other, whatever is trained."""
        return all(mine >= theirs for mine, theirs in zip(self.sizes, other.sizes, strict=True))


def micro_batch_of(examples: Sequence[Example]) -> MicroBatch:
    """The sizes of conversations that go through the model together, in their order."""
    lengths = tuple(example.input_tokens for example in examples)
    supervised = sum(e.supervised_tokens for e in examples)
    groups = ((group.conversations, group.length) for group in length_groups(lengths))
    found = (MicroBatch(sum(lengths), supervised, group) for group in groups)
    return max(found, key=lambda batch: batch.sizes[3:])


def dequantized_bytes(parameters: int, tuning: Tuning) -> int:
    """c·P and, with double quantization, 4·⌈P/64⌉: one matrix as its product reads it.

    Nothing where the matrix is dense. Where a kernel of CUDA reads the quantized matrix as it is,
    in the forward pass of a short micro-batch, this is too much; the backward pass needs it all the
    same. So are the constants where the fused step's kernel makes them in passing.

    Source: bitsandbytes 0.50.2, `_gemm_4bit_default_impl`, `MatMul4Bit.backward`,
    `MatMul8bitFp.forward`.
    """
    if tuning.loaded in memory.DENSE_BYTES:
        return 0
    nested = tuning.nested and tuning.precision in ("fp4", "nf4")
    constants = 4 * -(-parameters // memory.BLOCK) if nested else 0
    return memory.DENSE_BYTES[tuning.dense] * parameters + constants


def final_norm_bytes(model: Model, tuning: Tuning, batch: MicroBatch) -> int:
    """(4·h + 4)·N as every norm; trained, 4·h·N more, and c·h·S, the input of the trained head.

    Fused, (s·h + 4)·N.
    """
    flow, h = tuning.flow, model.hidden
    if flow.fused:
        return (flow.stream * h + 4) * batch.tokens
    if not flow.trained:
        return (4 * h + 4) * batch.tokens
    return (8 * h + 4) * batch.tokens + flow.compute * h * batch.supervised


def final_norm_gradient_bytes(hidden: int, tokens: int, tuning: Tuning) -> int:
    """20·h·N: five fp32 tensors of its backward pass, which stand side by side.

    Fused, three, and the gradient that comes, in the compute dtype: (12 + c)·h·N.

    Source: torch 2.13, tools/autograd/derivatives.yaml, `pow` and `mul`.
    """
    flow = tuning.flow
    return (12 + flow.compute if flow.fused else 20) * hidden * tokens


def loss_forward_bytes(vocabulary: int, supervised: int) -> int:
    """8·V·S: the logits and the logarithms of probabilities, in fp32.

    No other position reaches the head: most of a chat's tokens are not supervised.
    """
    return 8 * vocabulary * supervised


def loss_backward_bytes(vocabulary: int, supervised: int) -> int:
    """12·V·S: the logarithms, their gradient and that of the logits, in fp32.

    Source: torch 2.13, `nll_loss_backward`, `log_softmax_backward`.
    """
    return 12 * vocabulary * supervised


def fused_loss_bytes(model: Model, tuning: Tuning, batch: MicroBatch) -> int:
    """(c·n + 4·w)·V of logits in both dtypes, and 2·c·h·S of all inputs and their gradients.

    On CUDA w is 0.
    """
    v, s, c = model.vocabulary, batch.supervised, tuning.flow.compute
    n = chunk_tokens(v, s, c, tuning.device)
    w = 0 if tuning.device == "cuda" else fp32_chunk_tokens(v, n)
    return (c * n + 4 * w) * v + 2 * c * model.hidden * s


def fused_loss_gradient_bytes(model: Model, tuning: Tuning, batch: MicroBatch) -> int:
    """(2·c + 4)·h·S, or 2·c·h·S + c·h·N as it is laid out among all tokens, whichever is more."""
    c, h, s = tuning.flow.compute, model.hidden, batch.supervised
    return 2 * c * h * s + max(4 * h * s, c * h * batch.tokens)


def head_gradient_bytes(model: Model, tuning: Tuning, batch: MicroBatch) -> int:
    """4·V·h of the trained head's matrix, beside c·V·S of the logits and 4·h·S of its input."""
    v, s, h = model.vocabulary, batch.supervised, model.hidden
    return 4 * v * h + tuning.flow.compute * v * s + 4 * h * s


def waiting_gradient_bytes(model: Model, tuning: Tuning) -> int:
    """4·V·h: of a tied matrix, the head's part of the gradient waits for the embedding's."""
    tied = any(t.tied and t.kind == "head" for t in model.tensors)
    return 4 * model.vocabulary * model.hidden if tied and tuning.flow.trained else 0


def embedding_gradient_bytes(model: Model, tuning: Tuning) -> int:
    """4·V·h of a trained embedding; tied, three times: the head's part, its own, their sum."""
    own = 4 * model.vocabulary * model.hidden if tuning.flow.trained else 0
    return own * (3 if waiting_gradient_bytes(model, tuning) else 1)


def head_copy_bytes(model: Model, tuning: Tuning) -> int:
    """2·V·h: the copy that autocast makes of a head trained in fp32."""
    trained = tuning.flow.trained and tuning.casts_trained
    return 2 * model.vocabulary * model.hidden if trained else 0


def block_copies_bytes(model: Model, tuning: Tuning) -> int:
    """2·P of what is trained in fp32 in the blocks: autocast keeps a copy for the backward pass.

    So does the fused step on a GPU, for all of its micro-batches. On a CPU its functions make
    theirs for one product and let go of it.

    Source: torch 2.13, aten/src/ATen/autocast_mode.cpp, `cached_cast`.
    """
    if not tuning.casts_trained or (tuning.fused and tuning.device == "cpu"):
        return 0
    if tuning.adapter is not None:
        return 2 * tuning.adapter.multiplied
    return 2 * sum(t.size for t in model.tensors if t.kind == "linear")


def input_bytes(model: Model, tuning: Tuning, batch: MicroBatch) -> int:
    """16·N + 24·S of indices in int64, and 2·s·d·N of sines and cosines, d wide as a head."""
    block = model.block
    rotary = 2 * tuning.flow.stream * (block.query // block.heads) if block else 0
    return (16 + rotary) * batch.tokens + 24 * batch.supervised


def mask_bytes(model: Model, tuning: Tuning, batch: MicroBatch) -> int:
    """N²: which token may look at which, a byte a pair.

    transformers makes it for a packed row, though attention goes by the conversations' lengths.
    The fused step does not ask for it, unless a conversation is longer than a sliding window and
    attention is products, on a CPU.

    Source: transformers 5.23, transformers/masking_utils.py, `sdpa_mask`.
    """
    windowed = model.window is not None and batch.longest > model.window
    needed = windowed and not tuning.flow.kernel
    return 0 if tuning.fused and not needed else batch.tokens**2


def optimizer_step_bytes(model: Model, tuning: Tuning) -> int:
    """Temporaries of the update, which goes from one trained tensor to the next.

    8-bit AdamW of bitsandbytes on a CPU: 20·P of both moments, the scaled gradient, the root and
    its quotient, in fp32. Elsewhere one fused kernel, and nothing.

    Source: bitsandbytes 0.50.2, bitsandbytes/backends/cpu/ops.py,
    `_optimizer_update_8bit_blockwise_cpu`.
    """
    if tuning.device == "cuda" or tuning.optimizer != "adamw_8bit":
        return 0
    sizes = tuning.trained_sizes(model)
    return 20 * max((p for p in sizes if p >= memory.ADAM_8BIT_MINIMUM), default=0)
