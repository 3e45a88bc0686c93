"""How a step is computed on this machine: it changes the speed and the memory, never the result."""

import resource
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stages.shared import models
from stages.shared.errors import UserError
from stages.shared.machine import device, machine

NOTED = ("micro_batch_tokens", "gradient_checkpointing", "processes")


@dataclass(frozen=True)
class Computing:
    """The resolved settings of the machine, written into `reports/train.json`.

    Attributes:
        device: of this process.
        dtype: what matrix products run in.
        micro_batch_tokens: the most tokens that go through the model at once.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        processes: how many devices a step is divided among.
    """

    device: torch.device
    dtype: torch.dtype
    micro_batch_tokens: int
    gradient_checkpointing: bool
    processes: int

    @property
    def noted(self) -> dict[str, Any]:
        """What a checkpoint notes, and a training that goes on from it takes over."""
        return {name: getattr(self, name) for name in NOTED}

    def as_noted(self, noted: dict[str, Any]) -> "Computing":
        """The same as before a training was stopped, on as many of its devices as are there."""
        present = torch.cuda.device_count() if self.device.type == "cuda" else noted["processes"]
        return replace(self, **noted | {"processes": min(noted["processes"], present)})


def resolve(model_folder: Path) -> Computing:
    """What the user set, or a default for the kind of device.

    On a CPU a larger micro-batch gains nothing (measured: 300 tokens/s at 1024, 295 at 2048); on a
    GPU it amortises the dequantization of the weights.

    Raises:
        UserError: more devices are asked for than there are.
    """
    where, wanted = device(), machine()
    on_gpu = where.type == "cuda"
    present = torch.cuda.device_count() if on_gpu else None
    if wanted.devices and present and wanted.devices > present:
        raise UserError(
            f"QLORA_DEVICES is {wanted.devices}; this machine has {present} CUDA devices; "
            "expected at most as many; unset it to use all"
        )
    checkpointing = wanted.gradient_checkpointing
    return Computing(
        device=where,
        dtype=models.compute_dtype(model_folder, where),
        micro_batch_tokens=wanted.micro_batch_tokens or (4096 if on_gpu else 1024),
        gradient_checkpointing=on_gpu if checkpointing is None else checkpointing,
        processes=wanted.devices or present or 1,
    )


def peak_memory_bytes(where: torch.device) -> int:
    """The most that was held: by torch's allocator on a GPU, by the whole process on a CPU."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
