"""Load, train or go on training, and sum up what came of it."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stages.shared.core.machine import device, machine, root
from stages.shared.examples import Example, read_examples
from stages.shared.step import adapter, gradient, optim
from stages.shared.step.fused import liger
from stages.shared.step.fused.patch import fuse
from stages.train import computing, processes
from stages.train.checkpoints import Checkpoint, Checkpoints, claim
from stages.train.computing import Computing
from stages.train.curve import Curve
from stages.train.environment import environment
from stages.train.fingerprint import fingerprint
from stages.train.helpers import Helpers
from stages.train.loop import Data, Loop
from stages.train.processes import Processes
from stages.train.settings import Params

# A file or folder by what it is: `train` and `eval`, the conversations; `model`, the (quantized)
# weights; `original`, those before they were quantized, which `lora.init` loftq reads.
Inputs = Mapping[str, Path]


@dataclass(frozen=True)
class Outcome:
    """What came of a training: `reports/train.json`, the curve, and where it ran."""

    metrics: dict[str, Any]
    curve: Curve
    environment: dict[str, Any]


def resumable(settings: Params, inputs: Inputs) -> AbstractContextManager[Checkpoints]:
    """The checkpoints of this training, which no other process writes while the block runs."""
    read = [
        path for name, path in inputs.items() if name != "original" or _reads_original(settings)
    ]
    name = fingerprint(settings, device().type, read)
    return claim(root(), name, machine().keep_checkpoints)


def _reads_original(settings: Params) -> bool:
    return settings.train.method == "lora" and settings.lora.init == "loftq"


def train(settings: Params, inputs: Inputs, checkpoints: Checkpoints) -> Outcome:
    """Train to the end, from the last checkpoint if there is one; `checkpoints.best` is the result.

    Args:
        settings: the parameters.
        inputs: what it reads.
        checkpoints: of this very training, see `resumable`.

    Raises:
        Stopped: a signal came; a checkpoint holds all that was done.
        UserError: a parameter does not fit the model or the machine, or training diverged.
    """
    data = Data(read_examples(inputs["train"]), read_examples(inputs["eval"]))
    checkpoint = checkpoints.latest()
    noted = checkpoint.manifest["computing"] if checkpoint else None
    how = computing.resolve(settings, inputs["model"], data.train, data.held_out, noted)
    if checkpoint is not None:
        print(f"going on from {checkpoint.folder}", file=sys.stderr)
    return processes.run(
        how.processes, how.device, _train, settings, inputs, data, how, checkpoints, checkpoint
    )


def _train(
    among: Processes,
    where: torch.device,
    settings: Params,
    inputs: Inputs,
    data: Data,
    how: Computing,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None,
) -> Outcome:
    """What each process does."""
    how = replace(how, device=where)
    torch.manual_seed(settings.train.seed)  # before the adapter's random matrices are drawn
    model = (
        adapter.load_for_lora(inputs["model"], settings.lora, where, inputs.get("original"))
        if settings.train.method == "lora"
        else adapter.load_for_full(inputs["model"], where)
    )
    if how.fused:
        fuse(model)
    if how.gradient_checkpointing:
        model.config.use_cache = False
        model.activation_checkpointing_enable({"use_reentrant": False})
    every = machine().checkpoint_steps
    with helpers_of(model, how) as helpers:
        loop = Loop(model, data, settings.train, how, among, checkpoints, every, helpers)
        if checkpoint is not None:
            loop.load(checkpoint.state())
        elif among.leads:
            checkpoints.require_space(
                learning_parameters(model), optim.STATE_BYTES[settings.train.optimizer]
            )
        loop.run()
        return Outcome(_metrics(loop), loop.curve, environment(where))


def helpers_of(model: torch.nn.Module, how: Computing) -> Helpers:
    """Those that compute parts of a step as this process does, on a CPU."""
    unscaled = torch.amp.GradScaler("cpu", enabled=False)

    def work(micro_batches: list[list[Example]], supervised: int) -> torch.Tensor:
        return gradient.accumulate(
            model, micro_batches, supervised, dtype=how.dtype, fused=how.fused, scaler=unscaled
        )

    return Helpers(model, how.workers, work, how.predicted_bytes)


def learning_parameters(model: torch.nn.Module) -> int:
    """How many numbers training may change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _path(how: Computing) -> str:
    """What computes a step, for `reports/train.json`."""
    if not how.fused:
        return f"stock: {how.unfused_because}"
    return "fused, liger-kernel" if liger.covers(how.device) else "fused"


def _metrics(loop: Loop) -> dict[str, Any]:
    curve, how, size = loop.curve, loop.computing, loop.size
    train_loss = curve.train_loss(curve.best_step, loop.steps.per_epoch)
    return {
        "trainable_parameters": learning_parameters(loop.model),
        "steps": loop.done,
        "loss": train_loss,
        "eval_loss": curve.best_loss,
        "generalization_gap": None if train_loss is None else curve.best_loss - train_loss,
        "best_step": curve.best_step,
        "best_epoch": curve.rows[curve.best_step]["epoch"],
        "stopped_early": loop.done < loop.steps.total,
        "peak_memory_bytes": loop.peak_memory_bytes(),
        "predicted_memory_bytes": how.predicted_bytes,
        "tokens_per_second": round(size.tokens / loop.seconds, 1),
        "supervised_tokens_per_second": round(size.supervised_tokens / loop.seconds, 1),
        "padding_fraction": 1 - size.input_tokens / size.computed_tokens,
        "packing_efficiency": round(size.input_tokens / size.capacity_tokens, 4),
        "device": how.device.type,
        "devices": how.processes,
        "workers": how.workers,
        "optimizer": type(loop.optimizer).__name__,
        "micro_batch_tokens": how.micro_batch_tokens,
        "gradient_checkpointing": how.gradient_checkpointing,
        "path": _path(how),
        "checkpoint_bytes": loop.checkpoints.newest_bytes(),
        "resumed_from_step": loop.resumed_from,
    }
