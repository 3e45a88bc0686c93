"""What precisions cost: the relative error of what was written, and of what could have been.

A relative error is ‖W − Ŵ‖ / ‖W‖ (Frobenius), all matrices taken together: W in fp32 from the base,
Ŵ dequantized.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import torch

from stages.quantize import levels
from stages.quantize.convert import Layout
from stages.quantize.settings import DENSE
from stages.quantize.stored import Stored, Weights
from stages.shared import heap
from stages.shared.core import progress
from stages.shared.core.errors import UserError

COMPARED_PARAMETERS = 1_000_000_000  # of a larger model, every second, third, … matrix
PART_PARAMETERS = 1_000_000  # of a matrix, compared at a time
BLOCKS_FOR_ALPHA = 256  # of each matrix, evenly spread


@dataclass(frozen=True)
class Comparison:
    """Relative errors, as fractions.

    Attributes:
        relative_error: of what was written, over all matrices.
        errors: of each quantizer in `levels`, over the matrices compared.
        clip: the α of clipped linear 4-bit, one for the whole model.
        compared_parameters: how many parameters `errors` is over.
    """

    relative_error: float
    errors: dict[str, float]
    clip: float
    compared_parameters: int


class Base:
    """The matrices before they were quantized, turned as they are quantized."""

    def __init__(self, weights: Weights, layout: Layout, device: torch.device) -> None:
        self._weights, self._layout, self._device = weights, layout, device

    def matrix(self, name: str) -> torch.Tensor:
        """One matrix, fp32 [out, in].

        Raises:
            UserError: the base has no such tensor, or it holds a number that is not finite.
        """
        found = self._weights.find(name, self._layout.prefix)
        if found is None:
            raise UserError(
                f"{self._weights.folder}: {name} is not in the files under the name that the model "
                "has for it, so its error cannot be measured; load the model with this version of "
                "transformers and save it anew"
            )
        weight = self.upright(name, self._weights.tensor(found).to(self._device).float())
        if not weight.isfinite().all():
            raise UserError(
                f"{self._weights.folder}: {found} holds NaN or infinity; expected finite weights; "
                "choose another model"
            )
        return weight

    def upright(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A dense weight as [out, in], whichever way it is stored."""
        return weight.T.contiguous() if name in self._layout.transposed else weight


def compare(
    base: Base, written: Weights, matrices: Sequence[Stored], device: torch.device
) -> Comparison:
    """Measure what was written and what the quantizers would have made of it.

    Args:
        base: where the weights come from.
        written: what became of them.
        matrices: those of `written` that layers multiply with.
        device: where it is computed.
    """
    compared = {m.name for m in every_nth(matrices, COMPARED_PARAMETERS)}
    alpha = levels.best_alpha(sample(base, sorted(compared)))
    own = norm = compared_norm = 0.0
    errors: dict[str, float] = {}
    trim = heap.Trimmer()
    with progress.bar(total=len(matrices), desc="errors of the precisions", unit="matrix") as bar:
        for matrix in matrices:
            weight = base.matrix(matrix.name)
            values = written.values(matrix, device)
            if matrix.kind in DENSE:
                values = base.upright(matrix.name, values)
            own += levels.squared(weight - values)
            norm += levels.squared(weight)
            if matrix.name in compared:
                compared_norm += levels.squared(weight)
                for rows in in_parts(weight):
                    for name, error in levels.squared_errors(rows, alpha).items():
                        errors[name] = errors.get(name, 0.0) + error
            trim()
            bar.update()
    return Comparison(
        relative_error=relative(own, norm),
        errors={name: relative(error, compared_norm) for name, error in errors.items()},
        clip=alpha,
        compared_parameters=sum(m.parameters for m in matrices if m.name in compared),
    )


def every_nth(matrices: Sequence[Stored], budget: int) -> Sequence[Stored]:
    """All matrices, or every n-th, so that about `budget` parameters remain."""
    return matrices[:: max(1, ceil(sum(m.parameters for m in matrices) / budget))]


def in_parts(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """A matrix some rows at a time: quantizers take many times what they are given.

    A multiple of 64 rows, so that the blocks of a part are the blocks of the whole.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    return rows.split(levels.BLOCK * ceil(PART_PARAMETERS / (levels.BLOCK * rows.shape[1])))


def sample(base: Base, names: Sequence[str]) -> torch.Tensor:
    """Evenly spread blocks of each matrix: fp32 [blocks, 64]."""

    def some(name: str) -> torch.Tensor:
        in_blocks = levels.blocks(base.matrix(name))
        return in_blocks[:: ceil(len(in_blocks) / BLOCKS_FOR_ALPHA)].clone()

    trim = heap.Trimmer()
    with progress.bar(total=len(names), desc="best clipping", unit="matrix") as bar:
        parts = []
        for name in names:
            parts.append(some(name))
            trim()
            bar.update()
    return torch.cat(parts)


def relative(squared_error: float, squared_norm: float) -> float:
    """A relative error from two sums, to six digits: what follows is the order of summation."""
    return float(f"{sqrt(squared_error / squared_norm):.6g}") if squared_norm else 0.0
