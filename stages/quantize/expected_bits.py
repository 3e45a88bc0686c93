"""Expected bits a parameter of a precision, held against the bytes that were written.

transformers 5 fuses the experts of a mixture into one three-dimensional parameter, and bitsandbytes
quantizes linear layers only: it leaves such experts in bf16 without a word. So every matrix counts
here, not only the quantized ones.
"""

from collections.abc import Iterable, Sequence
from math import ceil, prod

from stages.quantize.config import FOUR_BIT, Quantize
from stages.quantize.quantization_error import BLOCK
from stages.shared.core.errors import UserError
from stages.shared.weights.checkpoint import Stored

NESTED_BLOCK = 256  # block constants that share one, where they are quantized too
DENSE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# Tables of each matrix, whatever its size: the 16 levels in fp32 and a description in JSON of under
# 256 bytes; with double quantization, the 256 levels of the constants.
TABLE_BYTES = 16 * 4 + 256
NESTED_TABLE_BYTES = 256 * 4
# Small matrices that are rightly dense, a router among experts; one linear layer forgotten in
# thirty times seven is more than that.
TOLERANCE = 0.01


def linear_matrices(parameters: Iterable[Stored], looked_up: frozenset[str]) -> list[Stored]:
    """The parameters that a linear layer or an expert multiplies with; no embedding, no head."""
    return [p for p in parameters if len(p.shape) > 1 and p.name not in looked_up]


def bits_per_parameter(matrices: Sequence[Stored]) -> float:
    """Measured: everything in the files that belongs to these matrices."""
    return 8 * sum(m.bytes for m in matrices) / sum(m.parameters for m in matrices)


def quantized_parameters(matrices: Iterable[Stored]) -> int:
    """How many of the parameters are stored in int8, fp4 or nf4."""
    return sum(m.parameters for m in matrices if m.parts)


def expected_bytes(shape: tuple[int, ...], precision: str, double_quant: bool) -> int:
    """Bytes of a matrix, without the tables that do not grow with it.

    int8 has one fp32 constant a row (LLM.int8(), https://arxiv.org/abs/2208.07339); 4-bit types one
    a block, or one byte a block and one fp32 constant for 256 of those (QLoRA,
    https://arxiv.org/abs/2305.14314): 0.5 or 0.127 bits a parameter.
    """
    count = prod(shape)
    if precision in DENSE_BYTES:
        return DENSE_BYTES[precision] * count
    if precision == "int8":
        return count + 4 * (count // shape[-1])
    blocks = ceil(count / BLOCK)
    constants = blocks + 4 * ceil(blocks / NESTED_BLOCK) if double_quant else 4 * blocks
    return ceil(count / 2) + constants


def require_expected_bits(matrices: Sequence[Stored], settings: Quantize) -> None:
    """Hold the files to the precision's bits.

    Raises:
        UserError: they take more, or less; names the matrix that is furthest off.
    """

    def expected(matrix: Stored) -> int:
        return expected_bytes(matrix.shape, settings.precision, settings.double_quant)

    tables = TABLE_BYTES + NESTED_TABLE_BYTES * settings.double_quant
    due, written = sum(map(expected, matrices)), sum(m.bytes for m in matrices)
    allowed = tables * len(matrices) * (settings.precision in FOUR_BIT) + TOLERANCE * due
    if abs(written - due) <= allowed:
        return
    worst = max(matrices, key=lambda m: abs(m.bytes - expected(m)))
    others = [m for m in matrices if m.kind != settings.precision]
    count = sum(m.parameters for m in matrices)
    share = sum(m.parameters for m in others) / count
    raise UserError(
        f"quantize.precision is {settings.precision}, {8 * due / count:.2f} bits a parameter, but "
        f"{8 * written / count:.2f} were written: {worst.name} is {worst.kind}, as are {share:.0%} "
        "of the linear parameters (bitsandbytes quantizes plain linear layers, no fused experts). "
        "Set quantize.precision=bf16, or choose another model."
    )
