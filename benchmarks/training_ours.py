"""Our training, a step at a time: the loop that `train` runs, without its evaluations.

Run:    by benchmarks.training, which tells it when (see benchmarks.paced)
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import stages.shared.models  # noqa: F401  (before peft is imported, as the stage has it)

# isort: split
import torch
from peft import PeftModel

from benchmarks import matrix_rate, resident
from benchmarks.paced import Channel
from benchmarks.training_data import training_params
from stages.shared.examples import read_examples
from stages.shared.step import adapter
from stages.shared.step.fused.patch import fuse
from stages.train import computing
from stages.train.computing import Computing
from stages.train.interruption import Interruption
from stages.train.loop import Data, Loop
from stages.train.processes import Processes
from stages.train.settings import Params
from stages.train.steps import Steps
from stages.train.training import helpers_of

NO_CHECKPOINTS: Any = None  # a step neither reads nor writes them


@dataclass(frozen=True)
class Given(Steps):
    """Steps whose conversations somebody else chose: `rows` of the split, step by step."""

    rows: tuple[tuple[int, ...], ...] = ()

    def drawn(self, step: int) -> list[int]:
        """The rows of a step."""
        return list(self.rows[step])


def make_loop(
    model: PeftModel,
    data: Data,
    settings: Params,
    how: Computing,
    steps: Sequence[Sequence[int]],
) -> Loop:
    """The loop of `stages.train.training`, with the model made ready as there, over given steps."""
    if how.fused:
        fuse(model)
    if how.gradient_checkpointing:
        model.config.use_cache = False
        model.activation_checkpointing_enable({"use_reentrant": False})
    helpers = helpers_of(model, how).__enter__()  # for as long as this process lives
    every = len(steps) + 1
    loop = Loop(model, data, settings.train, how, Processes(), NO_CHECKPOINTS, every, helpers)
    rows = tuple(map(tuple, steps))
    train = settings.train
    loop.steps = Given(
        len(data.train), train.batch_size, train.epochs, train.max_steps, train.seed, rows
    )
    return loop


def load(settings: Params, inputs: dict[str, Path]) -> tuple[PeftModel, Data, Computing]:
    """What `stages.train.training` loads before its loop begins."""
    data = Data(read_examples(inputs["train"]), read_examples(inputs["eval"]))
    how = computing.resolve(settings, inputs["model"], data.train, data.held_out)
    torch.manual_seed(settings.train.seed)
    return adapter.load_for_lora(inputs["model"], settings.lora, how.device), data, how


def take_step(loop: Loop) -> dict[str, Any]:
    """What the loop does between two evaluations, timed, with the matrix rate just before it."""
    device = loop.computing.device
    rate, before = matrix_rate.probe(device), loop.size
    with Interruption() as stop:
        started = time.perf_counter()
        loop._give_back_freed_memory()
        loss = loop._step(stop)
        matrix_rate.wait(device)
        seconds = time.perf_counter() - started
    after = loop.size
    helped = loop.helpers.peak_bytes() if loop.helpers else 0
    return {
        "seconds": seconds,
        "matrix_rate": rate,
        "loss": loss,
        "tokens": after.tokens - before.tokens,
        "input_tokens": after.input_tokens - before.input_tokens,
        "supervised_tokens": after.supervised_tokens - before.supervised_tokens,
        "computed_tokens": after.computed_tokens - before.computed_tokens,
        "peak_bytes": resident.peak_bytes(device) + helped,
    }


def main() -> None:
    """Load, then a step whenever one is asked for."""
    channel = Channel()
    job = channel.hear()
    resident.cap(job.get("cap_gib"))
    settings = training_params(train__batch_size=job["batch_size"])
    inputs = {
        "train": Path(job["data"]) / "train.parquet",
        "eval": Path(job["data"]) / "eval.parquet",
        "model": Path(job["model"]),
    }
    model, data, how = load(settings, inputs)
    loop = make_loop(model, data, settings, how, job["steps"])
    resident.forget_peak(how.device)
    channel.tell({"before_bytes": resident.now_bytes(how.device), **how.noted})
    while True:
        channel.hear()
        channel.tell(take_step(loop))


if __name__ == "__main__":
    main()
