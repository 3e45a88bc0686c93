"""Expected bits per parameter of a precision, compared with the written bytes.

All matrices count: transformers 5 fuses the experts of a mixture into one three-dimensional
parameter, which bitsandbytes silently leaves in bf16, as it quantizes linear layers only.
"""

from collections.abc import Iterable, Sequence

from stages.quantize.config import FOUR_BIT, Quantize
from stages.shared.core.errors import UserError
from stages.shared.weights.checkpoint import Stored
from stages.shared.weights.precision import stored_bytes

TABLE_BYTES = 16 * 4 + 256  # of a 4-bit matrix: codebook in fp32, and metadata in JSON, at most
NESTED_TABLE_BYTES = 256 * 4  # codebook of the constants
# For small dense matrices like a router; one dense linear layer among 30 × 7 exceeds it.
TOLERANCE = 0.01


def linear_matrices(parameters: Iterable[Stored], embeddings: frozenset[str]) -> list[Stored]:
    """Weights of linear layers and experts, without embedding and head."""
    return [p for p in parameters if len(p.shape) > 1 and p.name not in embeddings]


def bits_per_parameter(matrices: Sequence[Stored]) -> float:
    """Stored bits per parameter, with all constants."""
    return 8 * sum(m.bytes for m in matrices) / sum(m.parameters for m in matrices)


def quantized_parameters(matrices: Iterable[Stored]) -> int:
    """Number of parameters in int8, fp4 or nf4."""
    return sum(m.parameters for m in matrices if m.parts)


def require_expected_bits(matrices: Sequence[Stored], settings: Quantize) -> None:
    """Raise a UserError that names the worst matrix, unless the files have the expected size."""

    def expected(matrix: Stored) -> int:
        return stored_bytes(matrix.shape, settings.precision, settings.double_quant)

    tables = TABLE_BYTES + NESTED_TABLE_BYTES * settings.double_quant
    nominal, written = sum(map(expected, matrices)), sum(m.bytes for m in matrices)
    allowed = tables * len(matrices) * (settings.precision in FOUR_BIT) + TOLERANCE * nominal
    if abs(written - nominal) <= allowed:
        return
    worst = max(matrices, key=lambda m: abs(m.bytes - expected(m)))
    count = sum(m.parameters for m in matrices)
    share = sum(m.parameters for m in matrices if m.kind != settings.precision) / count
    raise UserError(
        f"quantize.precision is {settings.precision}, {8 * nominal / count:.2f} bits a "
        f"parameter, but {8 * written / count:.2f} were written: {worst.name} is {worst.kind}, as "
        f"are {share:.0%} of the linear parameters (bitsandbytes quantizes no fused experts). "
        "Set quantize.precision=bf16, or choose another model."
    )
