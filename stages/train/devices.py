"""Training on its devices: who takes part, where they begin, and when they begin again."""

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from stages.shared.core.machine import machine
from stages.shared.model.packing import read_examples
from stages.shared.parallel import launcher, member
from stages.shared.parallel.group import Group
from stages.shared.parallel.interruption import Interrupted, Interruption
from stages.shared.step import optim, targets
from stages.train import execution
from stages.train.checkpoints import Checkpoint, Checkpoints
from stages.train.config import Params
from stages.train.execution import ExecutionPlan
from stages.train.metrics import History, environment, metrics_of
from stages.train.recipe import Data, Inputs, Recipe, load_model

SET_UP = "while it was set up; `dvc repro` begins where it began"


@dataclass(frozen=True)
class TrainResult:
    """Metrics, `reports/train/loss.csv`, and the machine."""

    metrics: dict[str, Any]
    history: History
    environment: dict[str, Any]


def train(
    settings: Params,
    inputs: Inputs,
    checkpoints: Checkpoints,
    identity: dict[str, Any] | None = None,
    joined: tuple[Group, torch.device] | None = None,
) -> TrainResult:
    """Train to the end, from the newest checkpoint if there is one; keep `checkpoints.best`.

    A group of one host that loses a process begins again there, `QLORA_RESTARTS` times. Other
    processes are compared by `identity`; `joined` as of `member.joined`.

    Raises:
        Stopped: by a signal; a checkpoint holds all that was done.
        UserError: a parameter does not fit the model or the machine, or training diverged.
    """
    data = read_data(inputs)
    restarts = machine().restarts if machine().nodes == 1 else 0
    while True:
        checkpoint = checkpoints.latest()
        before = checkpoint.manifest["plan"] if checkpoint else None
        local = member.local_size() if joined else None
        plan = execution.make_plan(
            settings, inputs["model"], data.train, data.held_out, before, local
        )
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
            print(f"warning: {lost.what}; its group starts again", file=sys.stderr)


def follow(
    settings: Params, inputs: Inputs, identity: dict[str, Any], joined: tuple[Group, torch.device]
) -> None:
    """Train as one of the processes that write nothing; the first one tells plan and state."""
    train_on(*joined, settings, inputs, read_data(inputs), identity)


def read_data(inputs: Inputs) -> Data:
    """Read both splits."""
    return Data(read_examples(inputs["train"]), read_examples(inputs["eval"]))


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
    """The training as one device runs it; `group` has all of them. The first has all arguments."""
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
            raise stop.stopped("training", SET_UP) from None
        group.wait()  # a signal ends the setup of each process, and what follows for all of them
        recipe.run(stop)
        return TrainResult(metrics_of(recipe), recipe.history, environment(device))
