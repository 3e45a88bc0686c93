"""Few numbers for many: the quantizers that are compared, each there and back.

fp4, nf4 and int8 are bitsandbytes' own; linear 4-bit, plain and clipped, is the yardstick.
"""

import torch

from stages.shared.bnb import (
    dequantize_4bit,
    get_4bit_type,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)

BLOCK = 64  # weights that share a constant in all 4-bit types here
STEPS = 7  # of linear 4-bit, on either side of zero
ALPHAS = tuple(k / 40 for k in range(20, 41))  # 0.5, 0.525, …, 1


def blocks(weight: torch.Tensor) -> torch.Tensor:
    """A matrix row by row in blocks that share a constant: [blocks, 64], zeros at the end."""
    flat = weight.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def normalized(weight_blocks: torch.Tensor) -> torch.Tensor:
    """Blocks as fractions of their largest magnitude, from -1 to 1; a block of zeros stays."""
    return weight_blocks / _absmax(weight_blocks)


def linear4(weight_blocks: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """The nearest of 15 evenly spaced levels, up to α times the block's largest magnitude.

    Args:
        weight_blocks: fp32 [blocks, 64].
        alpha: where it is clipped, as a fraction of the largest magnitude.

    Returns:
        The numbers that these levels stand for, in the same shape.
    """
    step = _absmax(weight_blocks) * (alpha / STEPS)
    return (weight_blocks / step).round_().clamp_(-STEPS, STEPS).mul_(step)


def _absmax(weight_blocks: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block [blocks, 1], nowhere zero, so that one may divide."""
    return weight_blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)


def best_alpha(sample: torch.Tensor) -> float:
    """The α, among `ALPHAS`, with the smallest squared error on blocks, fp32 [blocks, 64]."""
    return min(ALPHAS, key=lambda alpha: squared(sample - linear4(sample, alpha)))


def four_bit(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Through bitsandbytes' fp4 or nf4 and back, with block constants in fp32."""
    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type=kind)
    return dequantize_4bit(packed, state)


def eight_bit(weight: torch.Tensor) -> torch.Tensor:
    """Through bitsandbytes' int8 and back, with one constant a row."""
    rows = weight.reshape(-1, weight.shape[-1])
    integers, constants, _ = int8_vectorwise_quant(rows.half())
    return int8_vectorwise_dequant(integers, constants).view(weight.shape)


def squared(difference: torch.Tensor) -> float:
    """The squared Frobenius norm, summed in double precision."""
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2


def squared_errors(weight: torch.Tensor, alpha: float) -> dict[str, float]:
    """The squared error that each quantizer makes on one matrix, fp32 [out, in]."""
    in_blocks = blocks(weight)
    return {
        "linear4_absmax": squared(in_blocks - linear4(in_blocks)),
        "linear4_clipped": squared(in_blocks - linear4(in_blocks, alpha)),
        "fp4": squared(weight - four_bit(weight, "fp4")),
        "nf4": squared(weight - four_bit(weight, "nf4")),
        "int8": squared(weight - eight_bit(weight)),
    }


def four_bit_levels(alpha: float) -> dict[str, list[float]]:
    """The levels of each 4-bit type, as ascending fractions of a block's largest magnitude."""
    linear = [k / STEPS for k in range(-STEPS, STEPS + 1)]
    library = {
        kind: sorted(set(get_4bit_type(kind, device="cpu").tolist())) for kind in ("fp4", "nf4")
    }
    clipped = [alpha * level for level in linear]
    return {"linear4_absmax": linear, "linear4_clipped": clipped, **library}
