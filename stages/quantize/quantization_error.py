"""Quantization error: of the weights that were written, and of each codebook they could have had.

A relative error is ‖W − Ŵ‖ / ‖W‖ (Frobenius), all matrices taken together: W in fp32 from the base,
Ŵ dequantized. fp4, nf4 and int8 are bitsandbytes' own; linear 4-bit, plain and clipped, is the
yardstick.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import torch

from stages.quantize.config import DENSE
from stages.shared.core import progress
from stages.shared.core.errors import UserError
from stages.shared.weights import bnb, checkpoint, heap
from stages.shared.weights.checkpoint import Stored, Weights

BLOCK = 64  # weights that share a constant in all 4-bit types here
STEPS = 7  # of linear 4-bit, on either side of zero
ALPHAS = tuple(k / 40 for k in range(20, 41))  # 0.5, 0.525, …, 1
COMPARED_PARAMETERS = 1_000_000_000  # of a larger model, every second, third, … matrix
PART_PARAMETERS = 1_000_000  # of a matrix, compared at a time
BLOCKS_FOR_ALPHA = 256  # of each matrix, evenly spread


@dataclass(frozen=True)
class Layout:
    """Names of a model's parameters by what its files do not say of them."""

    looked_up: frozenset[str]  # embeddings and head; never quantized
    transposed: frozenset[str]  # stored [in, out], as GPT-2's are
    prefix: str  # of all but the head


@dataclass(frozen=True)
class QuantizationError:
    """Relative errors, as fractions."""

    relative_error: float  # of the written weights, over all matrices
    errors: dict[str, float]  # of each codebook, over the matrices compared
    clip: float  # the α of clipped linear 4-bit, one for the whole model
    compared_parameters: int


class Base:
    """The matrices before they were quantized, in the orientation in which they are quantized."""

    def __init__(self, weights: Weights, layout: Layout, device: torch.device) -> None:
        self._weights, self._layout, self._device = weights, layout, device

    def matrix(self, name: str) -> torch.Tensor:
        """One matrix, fp32 [out, in].

        Raises:
            UserError: the base has no such tensor, or it holds a number that is not finite.
        """
        stored = self._weights.find(name, self._layout.prefix)
        if stored is None:
            raise UserError(
                f"{self._weights.folder}: {name} is not in the files under the model's name for "
                "it, so its error cannot be measured. Load the model with this version of "
                "transformers and save it anew."
            )
        weight = self.upright(name, self._weights.tensor(stored).to(self._device).float())
        checkpoint.require_finite({stored: weight}, self._weights)
        return weight

    def upright(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A dense weight as [out, in], whichever way it is stored."""
        return weight.T.contiguous() if name in self._layout.transposed else weight


def measure(
    base: Base, written: Weights, matrices: Sequence[Stored], device: torch.device
) -> QuantizationError:
    """Measure the written weights, and each codebook on the same matrices."""
    compared = {m.name for m in every_nth(matrices, COMPARED_PARAMETERS)}
    alpha = best_alpha(sample(base, sorted(compared)))
    own = norm = compared_norm = 0.0
    errors: dict[str, float] = {}
    trim = heap.Trimmer()
    with progress.bar(total=len(matrices), desc="errors of the precisions", unit="matrix") as bar:
        for matrix in matrices:
            weight = base.matrix(matrix.name)
            values = written.values(matrix, device)
            if matrix.kind in DENSE:
                values = base.upright(matrix.name, values)
            own += squared(weight - values)
            norm += squared(weight)
            if matrix.name in compared:
                compared_norm += squared(weight)
                for rows in in_parts(weight):
                    for name, error in squared_errors(rows, alpha).items():
                        errors[name] = errors.get(name, 0.0) + error
            trim()
            bar.update()
    return QuantizationError(
        relative_error=relative(own, norm),
        errors={name: relative(error, compared_norm) for name, error in errors.items()},
        clip=alpha,
        compared_parameters=sum(m.parameters for m in matrices if m.name in compared),
    )


def every_nth(matrices: Sequence[Stored], budget: int) -> Sequence[Stored]:
    """All matrices, or every n-th, so that about `budget` parameters remain."""
    return matrices[:: max(1, ceil(sum(m.parameters for m in matrices) / budget))]


def in_parts(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """A matrix some rows at a time: quantizers take many times its size.

    A multiple of 64 rows, so that the blocks of a part are the blocks of the whole.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    return rows.split(BLOCK * ceil(PART_PARAMETERS / (BLOCK * rows.shape[1])))


def sample(base: Base, names: Sequence[str]) -> torch.Tensor:
    """Evenly spread blocks of each matrix: fp32 [blocks, 64]."""
    trim = heap.Trimmer()
    parts = []
    with progress.bar(total=len(names), desc="best clipping", unit="matrix") as bar:
        for name in names:
            in_blocks = blocks(base.matrix(name))
            parts.append(in_blocks[:: ceil(len(in_blocks) / BLOCKS_FOR_ALPHA)].clone())
            del in_blocks
            trim()
            bar.update()
    return torch.cat(parts)


def relative(squared_error: float, squared_norm: float) -> float:
    """A relative error from two sums, to six digits: the next depend on the order of summation."""
    return float(f"{sqrt(squared_error / squared_norm):.6g}") if squared_norm else 0.0


def squared(difference: torch.Tensor) -> float:
    """The squared Frobenius norm, summed in double precision."""
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2


def blocks(weight: torch.Tensor) -> torch.Tensor:
    """A matrix row by row in blocks that share a constant: [blocks, 64], zeros at the end."""
    flat = weight.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def normalized(weight_blocks: torch.Tensor) -> torch.Tensor:
    """Blocks as fractions of their largest magnitude, from -1 to 1; a block of zeros stays."""
    return weight_blocks / _absmax(weight_blocks)


def linear4(weight_blocks: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """Blocks rounded to 15 evenly spaced levels, up to α times the largest magnitude of each."""
    step = _absmax(weight_blocks) * (alpha / STEPS)
    return (weight_blocks / step).round_().clamp_(-STEPS, STEPS).mul_(step)


def _absmax(weight_blocks: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block [blocks, 1], nowhere zero, so that one may divide."""
    return weight_blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)


def best_alpha(some_blocks: torch.Tensor) -> float:
    """The α, among `ALPHAS`, with the smallest squared error on blocks, fp32 [blocks, 64]."""
    return min(ALPHAS, key=lambda alpha: squared(some_blocks - linear4(some_blocks, alpha)))


def four_bit(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Through bitsandbytes' fp4 or nf4 and back, with block constants in fp32."""
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=kind)
    return bnb.dequantize_4bit(packed, state)


def eight_bit(weight: torch.Tensor) -> torch.Tensor:
    """Through bitsandbytes' int8 and back, with one constant a row."""
    rows = weight.reshape(-1, weight.shape[-1])
    integers, constants, _ = bnb.int8_vectorwise_quant(rows.half())
    return bnb.int8_vectorwise_dequant(integers, constants).view(weight.shape)


def squared_errors(weight: torch.Tensor, alpha: float) -> dict[str, float]:
    """The squared error of each codebook on one matrix, fp32 [out, in]."""
    in_blocks = blocks(weight)
    return {
        "linear4_absmax": squared(in_blocks - linear4(in_blocks)),
        "linear4_clipped": squared(in_blocks - linear4(in_blocks, alpha)),
        "fp4": squared(weight - four_bit(weight, "fp4")),
        "nf4": squared(weight - four_bit(weight, "nf4")),
        "int8": squared(weight - eight_bit(weight)),
    }


def codebooks(alpha: float) -> dict[str, list[float]]:
    """The levels of each 4-bit type, as ascending fractions of a block's largest magnitude."""
    linear = [k / STEPS for k in range(-STEPS, STEPS + 1)]
    library = {
        kind: sorted(set(bnb.get_4bit_type(kind, device="cpu").tolist())) for kind in ("fp4", "nf4")
    }
    clipped = [alpha * level for level in linear]
    return {"linear4_absmax": linear, "linear4_clipped": clipped, **library}
