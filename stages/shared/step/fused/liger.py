"""Kernels of liger-kernel, on a GPU where that is installed: one pass over memory for each formula.

What stands beside them in `norm`, `attention` and `feed_forward` is the same in operations of
torch, which read and write everything several times; a CPU takes those.

Source: Hsu et al. 2024, Liger Kernel, arXiv:2410.10989.
"""

from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

from stages.shared.step.fused import gpu

# Of the norm: what is added to its weight; all in fp32, as `norm` has it (the mode of Gemma); rows
# in whichever way is faster.
NO_OFFSET, IN_FP32, ANY_ROWS = 0.0, 1, None


RELEASE = "0.8."  # whose functions these are called as


@cache
def installed() -> bool:
    """Whether liger-kernel is, in a release that is known."""
    return bool(find_spec("liger_kernel")) and metadata.version("liger-kernel").startswith(RELEASE)


def cover(device: torch.device) -> bool:
    """Whether these are used for values on this device."""
    return gpu.on_gpu(device) and installed()


def normed(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y in the dtype of x, and ρ in fp32 [..., 1]: see `norm`."""
    y, _, root, *_ = _ops().rms_norm_forward(x, weight, epsilon, NO_OFFSET, IN_FP32, ANY_ROWS)
    return y, root.view(*x.shape[:-1], 1)


def norm_gradient(
    gradient: torch.Tensor, x: torch.Tensor, root: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """∂x, in the dtype of x, for a gradient ∂y."""
    from liger_kernel.ops.utils import calculate_settings  # noqa: PLC0415

    width = x.shape[-1]
    found: torch.Tensor
    found, _ = _ops().rms_norm_backward(
        gradient.contiguous(),
        x.view(-1, width),
        weight,
        root.view(-1),
        NO_OFFSET,
        IN_FP32,
        *calculate_settings(width),
        in_place=False,
        row_mode=ANY_ROWS,
        needs_dw=False,
    )
    return found


def turned(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [tokens, heads · head size] turned, see `attention.turned`."""
    found = query.clone(), key.clone()  # it turns them in their place
    by_head = (x.view(1, len(x), -1, cos.shape[-1]).transpose(1, 2) for x in found)
    _ops().rope_forward(*by_head, cos, sin)
    return found


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate)·up, of contiguous [tokens, inner]."""
    found: torch.Tensor = _ops().swiglu_forward(gate, up)[2]
    return found


def _ops() -> Any:
    from liger_kernel import ops  # noqa: PLC0415  (no dependency: used where it is installed)

    return ops
