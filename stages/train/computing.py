"""How a step is computed on this machine: it changes the speed and the memory, never the result."""

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.shared.core.errors import UserError
from stages.shared.core.machine import Machine, device, machine
from stages.shared.model import loading
from stages.shared.model.packing import Example
from stages.shared.step.fit import most_workers
from stages.shared.step.limits import total_memory_bytes
from stages.shared.step.setup import SWITCHED_OFF, Device
from stages.train.config import Params
from stages.train.fit import fit

NOTED = (
    "micro_batch_tokens",
    "gradient_checkpointing",
    "workers",
    "processes",
    "unfused_because",
)


@dataclass(frozen=True)
class Computing:
    """The resolved settings of the machine, written into `reports/train.json`.

    Attributes:
        device: of this process.
        dtype: what matrix products run in.
        micro_batch_tokens: the most tokens that go through the model at once.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        processes: how many devices a step is divided among.
        predicted_bytes: the most memory that it should need, on each device.
        unfused_because: why the library's own modules compute it; None if the fused functions do.
        workers: how many forks of a process compute parts of a step, itself among them.
        kept: what trained weights that are not an adapter's are kept in.
    """

    device: torch.device
    dtype: torch.dtype
    micro_batch_tokens: int
    gradient_checkpointing: bool
    processes: int = 1
    predicted_bytes: int | None = None
    unfused_because: str | None = None
    workers: int = 1
    kept: torch.dtype = torch.float32

    @property
    def fused(self) -> bool:
        """Whether the functions of stages/shared/step/fused compute the step."""
        return self.unfused_because is None

    @property
    def noted(self) -> dict[str, Any]:
        """What a checkpoint notes, and a training that goes on from it takes over."""
        return {name: getattr(self, name) for name in NOTED}


def resolve(
    settings: Params,
    model_folder: Path,
    train: Sequence[Example],
    held_out: Sequence[Example],
    noted: Mapping[str, Any] | None = None,
) -> Computing:
    """What the user sets; else, after a stop, what it was before; else what the plan chooses.

    Args:
        settings: the parameters.
        model_folder: of the (quantized) weights; only its config is read.
        train: the conversations that are learnt.
        held_out: those that are scored.
        noted: by the checkpoint that training goes on from.

    Raises:
        UserError: it does not fit this machine's memory, or more devices are asked for than there
            are.
    """
    where, asked = device(), _asked(noted)
    processes = _processes(where, asked)
    kind: Device = "cuda" if where.type == "cuda" else "cpu"
    alone = kind == "cuda" or processes > 1
    workers = 1 if alone else most_workers(settings.train.batch_size, asked.workers)
    found = fit(
        settings,
        model_folder,
        train,
        held_out,
        kind,
        total_memory_bytes(kind),
        asked.micro_batch_tokens,
        asked.gradient_checkpointing,
        workers,
        asked.fused,
        processes,
    )
    return Computing(
        device=where,
        dtype=loading.compute_dtype(model_folder, where),
        micro_batch_tokens=found.micro_batch_tokens,
        gradient_checkpointing=found.gradient_checkpointing,
        processes=processes,
        predicted_bytes=found.predicted_bytes,
        unfused_because=found.unfused_because,
        workers=found.workers,
        kept=loading.stored_dtype(model_folder),
    )


def _asked(noted: Mapping[str, Any] | None) -> Machine:
    """The settings of the machine; of a training that goes on, as before where they are not set."""
    wanted = machine()
    if noted is None:
        return wanted
    before = {name: noted[name] for name in NOTED if name in Machine.model_fields}
    before["devices"] = noted["processes"]
    before["fused"] = noted["unfused_because"] != SWITCHED_OFF
    return wanted.model_copy(
        update={
            name: value for name, value in before.items() if name not in wanted.model_fields_set
        }
    )


def _processes(where: torch.device, asked: Machine) -> int:
    """One a device: as many as are asked for, as were before, or as there are."""
    if where.type == "cpu":
        return asked.devices or 1
    present = torch.cuda.device_count()
    wanted = machine().devices
    if wanted and wanted > present:
        raise UserError(
            f"QLORA_DEVICES is {wanted}; this machine has {present} CUDA devices; expected at most "
            "as many; unset it to use all"
        )
    return min(asked.devices or present, present)


def peak_memory_bytes(where: torch.device) -> int:
    """The most that was held: by torch's allocator on a GPU, by the whole process on a CPU."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
