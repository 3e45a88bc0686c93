"""Triton kernels of our own, imported when first called: torch for CPUs comes without Triton."""

from typing import Any

import torch


def on_gpu(device: torch.device) -> bool:
    """Whether tensors on this device go through GPU kernels."""
    return device.type == "cuda"


def kernels() -> Any:
    """The module `triton_kernels`."""
    from stages.shared.step.fused import triton_kernels  # noqa: PLC0415

    return triton_kernels
