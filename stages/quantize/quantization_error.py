"""Quantization error of the written weights, and of each codebook; with a chart of codebooks.

Relative error is ‖W − Ŵ‖ / ‖W‖ (Frobenius) over all matrices: W in fp32 from the base, Ŵ
dequantized. fp4, nf4 and int8 are those of bitsandbytes; linear 4-bit, plain and clipped, is the
baseline.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.weights import bnb, checkpoint, heap
from stages.shared.weights.checkpoint import Stored, Weights
from stages.shared.weights.precision import BLOCK

STEPS = 7  # of linear 4-bit, on either side of zero
ALPHAS = tuple(k / 40 for k in range(20, 41))  # 0.5, 0.525, …, 1
COMPARED_PARAMETERS = 1_000_000_000  # of larger models, every nth matrix
PART_PARAMETERS = 1_000_000  # compared at a time
BLOCKS_FOR_ALPHA = 256  # of each matrix
BINS = 120  # of the chart's histogram
LABELS = {"nf4": "nf4", "linear4_clipped": "linear, clipped"}
LABELS |= {"linear4_absmax": "linear", "fp4": "fp4"}


@dataclass(frozen=True)
class Base:
    """Weights before quantization, and their names by the modules that they belong to."""

    weights: Weights
    device: torch.device
    embeddings: frozenset[str] = frozenset()  # and head; never quantized
    transposed: frozenset[str] = frozenset()  # stored [in, out], as in GPT-2
    prefix: str = "model"  # of all but the head

    def matrix(self, name: str) -> torch.Tensor:
        """A finite matrix, fp32 [out, in]; raises a UserError otherwise."""
        stored = self.weights.find(name, self.prefix)
        if stored is None:
            raise UserError(
                f"{self.weights.folder}: {name} is not in the files, so its error cannot be "
                "measured. Load and save the model with this version of transformers."
            )
        weight = self.weights.tensor(stored).to(self.device).float()
        checkpoint.require_finite({stored: weight}, self.weights)
        return self.as_out_in(name, weight)

    def as_out_in(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A dense weight as [out, in]."""
        return weight.T.contiguous() if name in self.transposed else weight


def measure(base: Base, written: Weights, matrices: Sequence[Stored]) -> dict[str, Any]:
    """Metrics: relative errors of the written weights and of each codebook, as fractions."""
    compared = {m.name: m.parameters for m in every_nth(matrices, COMPARED_PARAMETERS)}
    alpha = best_alpha(sample_blocks(base, sorted(compared)))
    written_error = norm = compared_norm = 0.0
    errors: dict[str, float] = {}
    for matrix in heap.each(matrices, "errors of the precisions", "matrix"):
        weight, values = base.matrix(matrix.name), written.values(matrix, base.device)
        if not matrix.parts:
            values = base.as_out_in(matrix.name, values)
        written_error += squared(weight - values)
        norm += squared(weight)
        if matrix.name in compared:
            compared_norm += squared(weight)
            for rows in split_rows(weight):
                for name, error in squared_errors(rows, alpha).items():
                    errors[name] = errors.get(name, 0.0) + error
    return {
        "relative_error": relative(written_error, norm),
        "errors": {name: relative(error, compared_norm) for name, error in errors.items()},
        "linear4_clip": alpha,  # of clipped linear 4-bit
        "compared_parameters": sum(compared.values()),
    }


def every_nth(matrices: Sequence[Stored], budget: int) -> Sequence[Stored]:
    """Every nth matrix, so that about `budget` parameters remain."""
    return matrices[:: max(1, ceil(sum(m.parameters for m in matrices) / budget))]


def split_rows(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """Parts of a matrix with the same blocks, as quantizers take many times the size of each."""
    rows = weight.reshape(-1, weight.shape[-1])
    return rows.split(BLOCK * ceil(PART_PARAMETERS / (BLOCK * rows.shape[1])))


def sample_blocks(base: Base, names: Sequence[str]) -> torch.Tensor:
    """Evenly spaced blocks of each matrix: fp32 [blocks, 64]."""
    parts = []
    for name in heap.each(names, "best clipping", "matrix"):
        in_blocks = blocks(base.matrix(name))
        parts.append(in_blocks[:: ceil(len(in_blocks) / BLOCKS_FOR_ALPHA)].clone())
        del in_blocks
    return torch.cat(parts)


def relative(squared_error: float, squared_norm: float) -> float:
    """Relative error to six digits: further ones depend on the order of summation."""
    return float(f"{sqrt(squared_error / squared_norm):.6g}") if squared_norm else 0.0


def squared(difference: torch.Tensor) -> float:
    """Squared Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2


def blocks(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of a flattened matrix: [blocks, 64], padded with zeros."""
    flat = weight.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def linear4(weight_blocks: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """Blocks rounded to 15 evenly spaced levels, up to α times their largest magnitude."""
    step = absmax(weight_blocks) * (alpha / STEPS)
    return (weight_blocks / step).round_().clamp_(-STEPS, STEPS).mul_(step)


def absmax(weight_blocks: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block, never zero: [blocks, 1]."""
    return weight_blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)


def best_alpha(some_blocks: torch.Tensor) -> float:
    """The α of `ALPHAS` with the smallest squared error."""
    return min(ALPHAS, key=lambda alpha: squared(some_blocks - linear4(some_blocks, alpha)))


def four_bit(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Round trip through bitsandbytes' fp4 or nf4, with block constants in fp32."""
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=kind)
    return bnb.dequantize_4bit(packed, state)


def eight_bit(weight: torch.Tensor) -> torch.Tensor:
    """Round trip through bitsandbytes' int8."""
    rows = weight.reshape(-1, weight.shape[-1])
    integers, constants, _ = bnb.int8_vectorwise_quant(rows.half())
    return bnb.int8_vectorwise_dequant(integers, constants).view(weight.shape)


def squared_errors(weight: torch.Tensor, alpha: float) -> dict[str, float]:
    """Squared error of each codebook on a matrix, fp32 [out, in]."""
    in_blocks = blocks(weight)
    return {
        "linear4_absmax": squared(in_blocks - linear4(in_blocks)),
        "linear4_clipped": squared(in_blocks - linear4(in_blocks, alpha)),
        "fp4": squared(weight - four_bit(weight, "fp4")),
        "nf4": squared(weight - four_bit(weight, "nf4")),
        "int8": squared(weight - eight_bit(weight)),
    }


def codebooks(alpha: float) -> dict[str, list[float]]:
    """Levels of each 4-bit type, as ascending fractions of a block's largest magnitude."""
    linear = [k / STEPS for k in range(-STEPS, STEPS + 1)]
    clipped = [alpha * level for level in linear]
    fp4, nf4 = (bnb.get_4bit_type(kind, device="cpu").unique().tolist() for kind in ("fp4", "nf4"))
    return {"linear4_absmax": linear, "linear4_clipped": clipped, "fp4": fp4, "nf4": nf4}


def draw(path: Path, name: str, weight: torch.Tensor, measured: dict[str, Any]) -> None:
    """Draw the histogram of a weight, fp32 [out, in], over the 4-bit codebooks, the best first."""
    in_blocks, errors = blocks(weight), measured["errors"]
    fractions = (in_blocks / absmax(in_blocks)).flatten()
    density = torch.histc(fractions.cpu(), bins=BINS, min=-1, max=1) / len(fractions) * BINS / 2
    figure, levels = Figure(figsize=(9.0, 4.8)), codebooks(measured["linear4_clip"])
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    top.stairs(
        density.numpy(), torch.linspace(-1, 1, BINS + 1).numpy(), fill=True, color="C5", alpha=0.45
    )
    top.set_title(f"Four bits for {name.removesuffix('.weight')}", loc="left")
    top.set_ylabel("density of its weights")
    below.set_ylabel("levels")
    top.tick_params(labelbottom=False)
    ranked = sorted(LABELS, key=errors.__getitem__)
    for row, kind in enumerate(ranked):
        label = f"{LABELS[kind]}: {errors[kind]:.2%}"
        style = {"linelengths": 0.6, "linewidths": 2, "color": f"C{[*LABELS].index(kind)}"}
        below.eventplot(levels[kind], lineoffsets=-row, label=label, **style)
    below.set_yticks([-row for row in range(len(ranked))], [LABELS[kind] for kind in ranked])
    below.grid(visible=False, axis="y")
    below.set_xlabel("weight, as a fraction of the largest magnitude in its block of 64")
    figure.legend(title="relative error,\nwhole model", loc="outside right upper")
    with files.whole_file(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
