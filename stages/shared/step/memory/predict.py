"""Predicted memory of a training step: persistent parts by formula, others by a dry run.

The dry run is a process of its own, started for the first answer that is not in the cache and asked
over pipes, a line of JSON each way. Answers are cached in `.counts/` at the root by the hash of the
model's config, the setup, the micro-batch, the versions of the libraries and the shared code.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.core.machine import root
from stages.shared.step.memory.setup import MicroBatch, TrainingSetup
from stages.shared.weights.precision import DENSE_BYTES

TRANSIENT = ("activations", "logits", "workspace")
PARTS = ("weights", "adapter", "gradients", "optimizer", *TRANSIENT)
# Divided weights that are whole in these phases, in place of two blocks.
GATHERED = {"start": "embedding", "loss": "head", "gradient of the loss": "head"}
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
SHARED = Path(__file__).parents[2]
MOST_COUNTED = 8  # micro-batches of a training; each takes half a second


@dataclass(frozen=True)
class Prediction:
    """The peak of a step, in bytes of live tensors by part, and the phase that it is in."""

    parts: dict[str, int]
    phase: str

    @property
    def total_bytes(self) -> int:
        """All parts."""
        return sum(self.parts.values())


class DryRun:
    """The process that counts, shared by all counters of this one and ended with the last."""

    users = 0
    process: subprocess.Popen[str] | None = None

    @classmethod
    def ask(cls, question: dict[str, Any]) -> dict[str, Any]:
        """Send a question and wait for its answer; UserError where the step cannot be counted."""
        if cls.process is None:
            command = "from stages.shared.step.memory import predict; predict.serve()"
            changes = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            cls.process = subprocess.Popen(  # noqa: S603  (this Python, this code)
                [sys.executable, "-c", command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | changes | {"PYTHONPATH": str(SHARED.parents[1])},
            )
        assert cls.process.stdin is not None and cls.process.stdout is not None
        try:
            print(json.dumps(question), file=cls.process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(cls.process.stdout.readline())
        except (OSError, ValueError):
            raise UserError(
                "memory: the process that counts a step was ended from outside. Run it again."
            ) from None
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    @classmethod
    def end(cls) -> None:
        """Kill it: it holds nothing."""
        if cls.process is not None:
            cls.process.kill()
            cls.process.communicate()
            cls.process = None


def serve() -> None:
    """Answer questions until there are no more: the main loop of the dry run's process."""
    answers, sys.stdout = sys.stdout, sys.stderr  # no library shall write among the answers
    from stages.shared.step.memory import dry_run  # noqa: PLC0415  (its patches stay in here)

    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = dry_run.answer(**question)
        except UserError as error:
            answer = {"error": str(error)}
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            answer = {
                "error": f"memory: a step of {question['config']} cannot be counted "
                f"({reason:.150}). Choose another model or setting."
            }
        print(json.dumps(answer), file=answers, flush=True)


class StepCounter:
    """Predicts steps of one model, from its config alone; a context manager."""

    def __init__(self, config: Path) -> None:
        self.config = config

    def __enter__(self) -> Self:
        DryRun.users += 1
        return self

    def __exit__(self, *_: object) -> None:
        DryRun.users -= 1
        if not DryRun.users:
            DryRun.end()

    def model(self) -> dict[str, Any]:
        """Sizes of the model: see `architecture.describe`."""
        return self._answer("describe")

    def persistent(self, setup: TrainingSetup) -> dict[str, Any]:
        """Bytes held from step to step: see `persistent_bytes`; and `dry_run.unfused_because`."""
        return self._answer("persistent", replace(setup, gradient_checkpointing=False))

    def predict(self, setup: TrainingSetup, batch: MicroBatch, shards: int = 1) -> Prediction:
        """The peak of a step of more than one micro-batch, the largest of them this one.

        `shards`: devices that matrices are divided among.
        """
        return _largest(self.persistent(setup), self._answer("step", setup, batch), shards)

    def predict_scoring(
        self, setup: TrainingSetup, batch: MicroBatch, shards: int = 1
    ) -> Prediction:
        """The peak of scoring held-out conversations between two steps: there are no gradients.

        Of a full fine-tune the weights are scored as their file will hold them: copies.
        """
        held = self.persistent(setup)
        copied = held["trainable"] + _less(held["divided_gradients"], shards) // 4
        copies = copied * DENSE_BYTES[setup.compute] if setup.rounds_masters else 0
        held |= {"gradients": 0, "divided_gradients": 0}
        scored = replace(setup, gradient_checkpointing=False, masters=not copies)
        found = _largest(held, self._answer("scoring", scored, batch), shards)
        parts = found.parts | {"workspace": found.parts["workspace"] + copies}
        return Prediction(parts, f"scoring, {found.phase}")

    def _answer(
        self, kind: str, setup: TrainingSetup | None = None, batch: MicroBatch | None = None
    ) -> dict[str, Any]:
        question: dict[str, Any] = {"kind": kind}
        question |= {"setup": setup and asdict(setup), "batch": batch and asdict(batch)}
        try:
            config = json.loads(self.config.read_bytes())
        except (OSError, ValueError, RecursionError):
            config = None  # the dry run says what is wrong with it
        key = json.dumps([question, config, _environment()], sort_keys=True)
        kept = root() / ".counts" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        try:
            return json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            answer = DryRun.ask({**question, "config": str(self.config.absolute())})
        kept.parent.mkdir(exist_ok=True)
        files.write_json(kept, answer)  # whole or not at all: two may write the same
        return answer


@cache
def _environment() -> list[str]:
    """Versions of libraries, and the hash of the shared code: a count depends on both."""
    code = hashlib.sha256()
    for path in sorted(SHARED.rglob("*.py")):
        code.update(path.read_bytes())
    return [*(f"{name} {version(name)}" for name in LIBRARIES), code.hexdigest()]


def _largest(held: dict[str, Any], phases: dict[str, dict[str, int]], shards: int) -> Prediction:
    """The phase that holds most, with what is held in all."""

    def parts(phase: str) -> dict[str, int]:
        found = {n: held[n] for n in PARTS[:4]} | phases[phase]
        if shards > 1:
            if phase == "update" and held["divided_states"]:  # of a part at a time, not a matrix
                part = held["largest_unit"] / shards
                found |= {
                    name: int(found[name] * part / held["largest_matrix"]) for name in TRANSIENT
                }
            end, block = GATHERED.get(phase), held["largest_block"]
            divided = (held["blocks"], held["embedding"], held["untied_head"])
            found["weights"] += sum(_less(size, shards) for size in divided)
            found["weights"] += held[end] if end else 2 * block
            found["gradients"] += _less(held["divided_gradients"], shards)
            found["optimizer"] += _less(held["divided_states"], shards)
            if held["divided_gradients"]:  # of what goes back, until they are scattered
                first = phase.startswith("backward pass of block 1 ")
                back = max(block, held["embedding"]) if first else block
                back = back if phase.startswith("backward") else 0
                found["gradients"] += held["head"] if phase == "gradient of the loss" else back
        return found

    predictions = [Prediction(parts(phase), phase) for phase in phases]
    return max(predictions, key=lambda one: one.total_bytes)


def _less(size: int, shards: int) -> int:
    """Bytes that a device holds more, less than none, where it holds a part."""
    return -(-size // shards) - size


def decisive(batches: Iterable[MicroBatch]) -> list[MicroBatch]:
    """At most `MOST_COUNTED` micro-batches that decide a training's peak.

    Memory is about linear in their sizes: of those that no other equals or exceeds in every size,
    the largest in each size, then those large in all. Of five trainings with 11 to 28 such ones,
    the peak of these eight was at most 0.24 % below that of all.
    """
    largest: list[MicroBatch] = []
    for batch in sorted(batches, key=lambda batch: batch.sizes, reverse=True):
        sizes = batch.sizes
        if not any(all(map(int.__ge__, larger.sizes, sizes)) for larger in largest):
            largest.append(batch)
    most = [max(sizes) for sizes in zip(*(batch.sizes for batch in largest), strict=True)]

    def shares(batch: MicroBatch) -> float:
        return sum(size / top for size, top in zip(batch.sizes, most, strict=True) if size)

    extremes = (max(largest, key=lambda b: (b.sizes[i], shares(b))) for i in range(len(most)))
    ranked = dict.fromkeys([*extremes, *sorted(largest, key=shares, reverse=True)])
    return list(ranked)[:MOST_COUNTED]
