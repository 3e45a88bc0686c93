"""Execution plan: how a step is computed on this machine, which changes no result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.shared.core.errors import UserError
from stages.shared.core.machine import Machine, device, machine
from stages.shared.model import loading, packing, scoring
from stages.shared.model.packing import Example, require_vocabulary
from stages.shared.parallel import placement
from stages.shared.step.memory import fit
from stages.shared.step.memory.predict import StepCounter
from stages.shared.step.memory.setup import (
    SWITCHED_OFF,
    Device,
    Workload,
    lora_of,
    micro_batch_of,
    setup_of,
    stored_as,
)
from stages.shared.weights import heap, precision
from stages.train.config import Params, Schedule

# The heap is trimmed above this share of the predicted memory. At 1, the default's was before each
# step: 7,000 page faults a second instead of 130.
TRIM_ABOVE = 1.25
MOST_STEPS = 10_000  # that are looked at; the longest conversations stand for more
SAVED = ["micro_batch_tokens", "gradient_checkpointing", "processes", "unfused_because", "sharded"]


@dataclass(frozen=True)
class ExecutionPlan:
    """The resolved settings of the machine; `reports/train.json` has them."""

    device: torch.device  # of this process
    compute_dtype: torch.dtype  # of matmuls
    micro_batch_tokens: int  # the most that go through the model at once
    gradient_checkpointing: bool
    processes: int = 1  # devices that share a step
    predicted_bytes: int | None = None  # that each device, or a CPU's processes, will hold
    unfused_because: str | None = None  # why transformers and peft compute the step
    storage_dtype: torch.dtype = torch.float32  # of trained base weights in their file
    sharded: bool = False  # each device holds a part of the matrices

    @property
    def fused(self) -> bool:
        """Whether stages/shared/step/fused computes the step."""
        return self.unfused_because is None

    @property
    def saved(self) -> dict[str, Any]:
        """Settings that a checkpoint holds, for a resumed training to keep to."""
        return {name: getattr(self, name) for name in SAVED}

    def trim_heap(self) -> None:
        """Return freed pages where a CPU's process has outgrown its share of the prediction."""
        if self.device.type == "cpu" and self.predicted_bytes:
            share = self.predicted_bytes / (self.processes // machine().nodes or 1)
            heap.trim_above(round(TRIM_ABOVE * share))


def make_plan(
    settings: Params,
    model_folder: Path,
    train: Sequence[Example],
    held_out: Sequence[Example],
    saved: Mapping[str, Any] | None = None,
) -> ExecutionPlan:
    """Resolve each setting: `QLORA_*`, else the saved plan, else the fastest predicted to fit.

    `saved` is the plan of the checkpoint that training resumes from. Reads no weights.

    Raises:
        UserError: too little memory, too few devices, or `lora.target_modules` match nothing.
    """
    target, requested = device(), _requested(saved)
    device_type: Device = "cuda" if target.type == "cuda" else "cpu"
    processes = placement.device_count(target, requested.devices)
    config = model_folder / "config.json"
    setup = setup_of(
        stored_as(config),
        settings.lora,
        settings.train,
        device_type,
        bf16=precision.has_bf16_matmuls(device_type),
        fused=requested.fused,
    )
    with StepCounter(config) as counter:
        for split in (train, held_out):
            require_vocabulary(split, counter.model()["vocabulary"])
        request = fit.Request(
            counter,
            setup,
            Workload(_steps(settings, train)),
            placement.total_memory_bytes(device_type),
            requested.micro_batch_tokens,
            requested.gradient_checkpointing,
            scored=frozenset(map(micro_batch_of, packing.bins(held_out, scoring.SCORING_TOKENS))),
            processes=processes if device_type == "cpu" else 1,
            shards=fit.shard_counts(processes * requested.nodes, requested.shard),
            instead_of_full=lora_of(settings.lora),
        )
        choice = fit.choose(request)
        if choice is None:
            raise UserError(fit.refusal(request))
        unfused_because = counter.persistent(setup)["unfused_because"]
    return ExecutionPlan(
        device=target,
        compute_dtype=loading.compute_dtype(model_folder, target),
        micro_batch_tokens=choice.micro_batch_tokens,
        gradient_checkpointing=choice.gradient_checkpointing,
        processes=processes * requested.nodes,
        predicted_bytes=choice.device_bytes,
        unfused_because=unfused_because,
        storage_dtype=loading.stored_dtype(model_folder),
        sharded=choice.shards > 1,
    )


def _steps(settings: Params, train: Sequence[Example]) -> list[list[Example]]:
    schedule = Schedule(settings.train, len(train))
    if schedule.total > MOST_STEPS:
        return [sorted(train, key=len)[-settings.train.batch_size :]]
    return [[train[row] for row in schedule.rows(step)] for step in range(schedule.total)]


def _requested(saved: Mapping[str, Any] | None) -> Machine:
    """`QLORA_*`, and where they are unset the saved plan's settings."""
    requested = machine()
    if saved is None:
        return requested
    before = {name: saved[name] for name in SAVED if name in Machine.model_fields}
    before["devices"] = max(1, saved["processes"] // requested.nodes)
    before["fused"] = saved["unfused_because"] != SWITCHED_OFF
    unset = before.keys() - requested.model_fields_set
    return requested.model_copy(update={name: before[name] for name in unset})
