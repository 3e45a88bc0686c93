"""Memory of a process and its forks: what they share, and what is a fork's alone."""

import mmap
from collections.abc import Sequence
from pathlib import Path

import torch

ALIGNMENT = 64  # bytes, a line of the cache


def own_peak_bytes() -> int:
    """What is this process's alone, and what it once held more."""
    kibibytes = {
        key: int(value.split()[0])
        for name in ("smaps_rollup", "status")
        for key, _, value in (
            line.partition(":")
            for line in Path(f"/proc/self/{name}").read_text().splitlines()
            if line.startswith(("Private", "VmHWM", "VmRSS"))
        )
    }
    own = sum(size for key, size in kibibytes.items() if key.startswith("Private"))
    return 1024 * (own + kibibytes["VmHWM"] - kibibytes["VmRSS"])


def shared_like(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of the same shapes and dtypes, all zero, in memory that a fork shares."""
    if not tensors:
        return []
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    room = torch.frombuffer(mmap.mmap(-1, sum(sizes)), dtype=torch.uint8)
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(room.split(sizes), tensors, strict=True)
    ]
