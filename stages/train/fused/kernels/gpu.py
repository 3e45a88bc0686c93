"""Our own kernels, each imported when it is first called: a CPU's torch comes without Triton."""

from typing import Any

import torch


def covers(device: torch.device) -> bool:
    """Whether values on this device go through them: a GPU's, whose torch brings Triton along."""
    return device.type == "cuda"


def dequantized(codes: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """A 4-bit matrix, see `dequantization.dequantized`."""
    from stages.train.fused.kernels import dequantization  # noqa: PLC0415

    return dequantization.dequantized(codes, state, dtype)


def gate_gradients(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor) -> None:
    """∂gate, ∂up and the result, in the place of what they came from, see `gate.gradients`."""
    from stages.train.fused.kernels import gate as kernel  # noqa: PLC0415

    kernel.gradients(gate, up, gradient)


def losses_of(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
    """Losses of logits, which become their gradients, see `losses.into_gradients`."""
    from stages.train.fused.kernels import losses as kernel  # noqa: PLC0415

    kernel.into_gradients(logits, targets, losses)
