"""GPU kernels: our own in Triton, and liger-kernel's RMSNorm, RoPE and SwiGLU where installed.

Each is one pass over memory; the same formulas in torch's operations take several. Both packages
are imported when first called: torch for CPUs comes without Triton, and liger-kernel is an extra.

Source: Hsu et al. 2024, Liger Kernel, arXiv:2410.10989.
"""

from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

# RMSNorm: no offset on the weight; all in fp32, as `rms_norm` computes (the mode of Gemma); rows
# in whichever way is faster.
NO_OFFSET, IN_FP32, ANY_ROWS = 0.0, 1, None
LIGER_RELEASE = "0.8."  # its functions' signatures


def on_gpu(device: torch.device) -> bool:
    """Whether tensors on this device go through GPU kernels."""
    return device.type == "cuda"


def kernels() -> Any:
    """The module `triton_kernels`."""
    from stages.shared.step.fused import triton_kernels  # noqa: PLC0415

    return triton_kernels


def uses_liger(device: torch.device) -> bool:
    """Whether tensors on this device go through liger-kernel, in a release that is known."""
    return on_gpu(device) and _has_liger()


@cache
def _has_liger() -> bool:
    found = bool(find_spec("liger_kernel"))
    return found and metadata.version("liger-kernel").startswith(LIGER_RELEASE)


def rms_norm_forward(norm: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rms_norm.rms_norm_forward`."""
    settings = norm.variance_epsilon, NO_OFFSET, IN_FP32, ANY_ROWS
    y, _, rstd, *_ = _liger().rms_norm_forward(x, norm.weight, *settings)
    return y, rstd.view(*x.shape[:-1], 1)


def rms_norm_backward(
    norm: Any, dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See `rms_norm.rms_norm_backward`."""
    from liger_kernel.ops.utils import calculate_settings  # noqa: PLC0415

    width = x.shape[-1]
    inputs = dy.contiguous(), x.view(-1, width), norm.weight, rstd.view(-1)
    settings = NO_OFFSET, IN_FP32, *calculate_settings(width)
    options = {"in_place": False, "row_mode": ANY_ROWS, "needs_dw": False}
    return _liger().rms_norm_backward(*inputs, *settings, **options)[0]


def apply_rope_qk(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `qkv.apply_rope_qk`."""
    rotated = query.clone(), key.clone()  # the kernel works in place
    by_head = (x.view(1, len(x), -1, cos.shape[-1]).transpose(1, 2) for x in rotated)
    _liger().rope_forward(*by_head, cos, sin)
    return rotated


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate)·up, of contiguous [tokens, inner]."""
    return _liger().swiglu_forward(gate, up)[2]


def _liger() -> Any:
    from liger_kernel import ops  # noqa: PLC0415

    return ops
