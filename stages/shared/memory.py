"""Memory by formula: what a training step keeps from one step to the next, a term a function.

Weights, adapter, gradients and optimizer states. What lives only within a step is in
`stages.shared.blocks` and `stages.shared.workspace`, so a sum of these terms is called persistent
and never the peak.

P is a number of parameters; every result is in bytes (`_bytes`) or a count. Nothing here needs
torch: `stages.shared.architecture` says which tensors a model has.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from stages.shared.tensors import Tensor

Precision = Literal["fp32", "bf16", "fp16", "int8", "fp4", "nf4"]
DensePrecision = Literal["fp32", "bf16", "fp16"]
Optimizer = Literal["adamw", "adamw_8bit"]

DENSE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
BLOCK = 64  # weights that share a constant in fp4 and nf4
NESTED_BLOCK = 256  # constants that share a constant with double quantization
ADAM_8BIT_BLOCK = 256  # elements of an 8-bit state that share a constant
PAGED_MINIMUM = 100_000  # a tensor with fewer elements keeps its states on the device
ADAM_8BIT_MINIMUM = 4096  # a tensor with fewer elements keeps its states in fp32


class FourBit(NamedTuple):
    """Bytes of weights in fp4 or nf4, by part."""

    codes: int
    constants: int
    nested_constants: int


@dataclass(frozen=True)
class Persistent:
    """What a way of tuning keeps through training, in bytes."""

    weights_bytes: int
    adapter_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def persistent_bytes(self) -> int:
        """The sum of the four; not the peak: activations, logits and the device come on top."""
        return self.weights_bytes + self.adapter_bytes + self.gradients_bytes + self.optimizer_bytes


def dense_bytes(parameters: int, precision: str) -> int:
    """4·P in fp32, 2·P in bf16 and fp16."""
    return DENSE_BYTES[precision] * parameters


def int8_bytes(rows: int, columns: int) -> int:
    """One matrix in int8: P + 4·rows, a code a weight and an fp32 absmax a row.

    Source: Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, section 2.1.
    """
    return rows * columns + 4 * rows


def four_bit_bytes(parameters: int, double_quant: bool) -> FourBit:
    """One matrix in fp4 or nf4: half a byte a weight, and constants a block of 64 weights.

    Without double quantization P/2 + 4·⌈P/64⌉, 4.5 bits a parameter: the constants are fp32. With
    it P/2 + ⌈P/64⌉ + 4·⌈⌈P/64⌉/256⌉, 4.127 bits: they are 8-bit and share an fp32 constant a block
    of 256.

    Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
    """
    codes, blocks = _ceil(parameters, 2), _ceil(parameters, BLOCK)
    if not double_quant:
        return FourBit(codes, 4 * blocks, 0)
    return FourBit(codes, blocks, 4 * _ceil(blocks, NESTED_BLOCK))


def level_tables_bytes(double_quant: bool) -> int:
    """Fp32 tables that each matrix carries: 16 levels, with double quantization 256 and a mean.

    Source: bitsandbytes 0.50.2, `QuantState`.
    """
    return 4 * (16 + 256 + 1) if double_quant else 4 * 16


def dense_precision(precision: str, dense: str) -> str:
    """What is not quantized: a model that is dense throughout has one precision, `precision`."""
    return precision if precision in DENSE_BYTES else dense


def matrix_bytes(tensor: Tensor, precision: str, double_quant: bool) -> int:
    """A matrix that bitsandbytes quantizes, in any precision."""
    if precision in DENSE_BYTES:
        return dense_bytes(tensor.size, precision)
    if precision == "int8":
        return int8_bytes(*tensor.shape)
    return sum(four_bit_bytes(tensor.size, double_quant)) + level_tables_bytes(double_quant)


def weights_bytes(
    tensors: Iterable[Tensor],
    precision: str,
    *,
    double_quant: bool = False,
    dense: str = "bf16",
) -> int:
    """All weights of a model.

    Args:
        tensors: of the model.
        precision: of the linear layers that can be quantized.
        double_quant: fp4 and nf4 alone.
        dense: int8, fp4 and nf4: precision of embedding, head, norms and all else that stays dense.
    """
    rest = dense_precision(precision, dense)
    return sum(
        matrix_bytes(t, precision, double_quant) if t.quantizable else dense_bytes(t.size, rest)
        for t in tensors
        if not t.tied
    )


def lora_sizes(tensor: Tensor, rank: int, *, dora: bool = False) -> list[int]:
    """Elements of the adapter of a matrix: A has r·in, B has out·r; together r·(in + out).

    DoRA learns the magnitude of each output besides: out more. Of experts that lie in one tensor
    each has an adapter, of r for each of the layers that the tensor was made of.

    Sources: Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.1; Liu et al. 2024, DoRA,
    arXiv:2402.09353, section 4.
    """
    rows, columns = tensor.shape[-2:]
    rank *= prod(tensor.shape[:-2]) * max(1, len(tensor.parts))
    return [rank * columns, rows * rank] + ([rows] if dora else [])


def gradients_bytes(trainable: int, precision: str = "fp32") -> int:
    """A gradient a trainable parameter, in the parameter's own precision."""
    return dense_bytes(trainable, precision)


def adamw_bytes(trainable: int) -> int:
    """Two fp32 moments a trainable parameter: 8 bytes.

    In fp32 whatever the parameter is in, as the paged AdamW of bitsandbytes keeps them; that of
    torch follows the parameter, and would take 4 bytes in pure bf16. Paged or not, the bytes are
    the same; a paged one may leave the device.

    Source: Loshchilov and Hutter 2017, AdamW, arXiv:1711.05101, algorithm 2.
    """
    return 8 * trainable


def adamw_8bit_bytes(sizes: Iterable[int]) -> int:
    """Two 8-bit moments and two fp32 constants a block of 256: 2.03 bytes a trainable parameter.

    A tensor with fewer than 4,096 elements keeps its moments in fp32.

    Source: Dettmers et al. 2021, 8-bit optimizers via block-wise quantization, arXiv:2110.02861;
    bitsandbytes 0.50.2, bitsandbytes/optim/optimizer.py, `Optimizer2State.init_state`.
    """
    return sum(
        2 * size + 8 * _ceil(size, ADAM_8BIT_BLOCK)
        if size >= ADAM_8BIT_MINIMUM
        else adamw_bytes(size)
        for size in sizes
    )


def optimizer_bytes(optimizer: str, sizes: Sequence[int]) -> int:
    """States of `adamw` or `adamw_8bit` for trainable tensors of these sizes."""
    return adamw_8bit_bytes(sizes) if optimizer == "adamw_8bit" else adamw_bytes(sum(sizes))


def pageable_bytes(optimizer: str, sizes: Iterable[int]) -> int:
    """Of the states of a paged optimizer, what may leave a full device for the host.

    Those of tensors with 100,000 elements and more.

    Source: bitsandbytes 0.50.2, bitsandbytes/optim/optimizer.py, `get_state_buffer`.
    """
    return optimizer_bytes(optimizer, [size for size in sizes if size >= PAGED_MINIMUM])


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
