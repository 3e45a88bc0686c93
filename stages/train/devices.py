"""Training on its devices: which processes take part, and where they begin, or begin again."""

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from stages.shared.core.machine import machine
from stages.shared.parallel import launcher
from stages.shared.parallel.group import Group, Member
from stages.shared.parallel.interruption import Interrupted, Interruption
from stages.shared.step import optim, targets
from stages.train import execution
from stages.train.checkpoints import Checkpoint, Checkpoints
from stages.train.config import Params
from stages.train.execution import ExecutionPlan
from stages.train.metrics import History, metrics_of
from stages.train.recipe import Data, Inputs, Recipe, load_model


@dataclass(frozen=True)
class TrainResult:
    """Metrics, and the history for `reports/train/loss.csv`."""

    metrics: dict[str, Any]
    history: History


def train(
    settings: Params,
    inputs: Inputs,
    checkpoints: Checkpoints,
    identity: dict[str, Any] | None = None,
    joined: Member | None = None,
) -> TrainResult:
    """Train to the end, from the newest checkpoint if there is one; keep `checkpoints.best`.

    A group of one host that loses a process resumes from there, `QLORA_RESTARTS` times. Processes
    are compared by `identity`; `joined` as of `group.joined`.

    Raises:
        Stopped: by a signal; a checkpoint holds all that was done.
        UserError: a parameter does not fit the model or the machine, or training diverged.
    """
    data = Data.read(inputs)
    restarts = machine().restarts if machine().nodes == 1 else 0
    while True:
        checkpoint = checkpoints.latest()
        saved = checkpoint.manifest["plan"] if checkpoint else None
        plan = execution.make_plan(settings, inputs["model"], data.train, data.held_out, saved)
        if checkpoint is not None:
            print(f"going on from {checkpoint.folder}", file=sys.stderr)
        arguments: Any = (settings, inputs, data, identity or {}, plan, checkpoints, checkpoint)
        if joined:
            return train_on(*joined, *arguments)
        try:
            return launcher.launch(plan.processes, plan.device, train_on, *arguments)
        except launcher.WorkerLost as lost:
            if restarts == 0:
                raise
            restarts -= 1
            print(f"warning: {lost.args[0]}; its group starts again", file=sys.stderr)


def train_on(
    group: Group,
    device: torch.device,
    settings: Params,
    inputs: Inputs,
    data: Data,
    identity: dict[str, Any],
    plan: ExecutionPlan | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint: Checkpoint | None = None,
) -> TrainResult:
    """The training as one process of `group` runs it.

    Plan, checkpoints and the checkpoint to resume from are the first one's, which sends them to the
    others; they write nothing.
    """
    with Interruption() as stop:
        try:
            with stop.at_once():
                group.require_same(identity)
                state = checkpoint.state() if checkpoint and group.is_main else None
                plan, checkpoints, state = group.broadcast((plan, checkpoints, state))
                assert plan is not None and checkpoints is not None  # the first one's
                if group.is_main and group.size > 1:
                    checkpoints.hold()
                plan = replace(plan, device=device, processes=group.size)
                model = load_model(settings, inputs, device, plan.sharded)
                if group.is_main and (line := targets.left_out(model)):
                    print(line, file=sys.stderr)
                recipe = Recipe(model, data, settings.train, plan, checkpoints, group)
                if state is not None:
                    tensors = checkpoint.tensors() if checkpoint else ()
                    recipe.load_state(state, group.stream(tensors))
                elif group.is_main:
                    state_bytes = optim.STATE_BYTES[settings.train.optimizer]
                    checkpoints.require_space(recipe.trainable_parameters, state_bytes)
        except Interrupted:
            when = "while it was set up; `dvc repro` begins where it began"
            raise stop.stopped("training", when) from None
        group.wait()  # a signal ends the setup of each process, and what follows for all of them
        recipe.run(stop)
        return TrainResult(metrics_of(recipe), recipe.history)
