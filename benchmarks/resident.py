"""The memory of this process on a device: now, and the most of a stretch of work.

On a CPU all that is resident; on a GPU what torch has allocated, without CUDA's context.
"""

from pathlib import Path

import torch

from benchmarks import measured
from stages.shared import heap
from stages.shared.fitting import GIB


def now_bytes(device: torch.device) -> int:
    """What is held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return heap.resident_bytes()


def peak_bytes(device: torch.device) -> int:
    """The most that was held since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return measured.peak_bytes()


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin at what is held now: how a model was loaded is another matter.

    Source: proc(5), /proc/pid/clear_refs, value 5.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def cap(gib: float | None) -> None:
    """Let torch have no more of the GPU than this; None for all of it, and nothing on a CPU."""
    if gib is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * GIB / total, 0)
