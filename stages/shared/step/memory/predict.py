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
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from stages.shared.core import files
from stages.shared.core.command import quick_imports
from stages.shared.core.errors import UserError
from stages.shared.core.machine import root
from stages.shared.step.memory.setup import MicroBatch, TrainingSetup
from stages.shared.weights.precision import DENSE_BYTES

PERSISTENT = ("weights", "adapter", "gradients", "optimizer")
TRANSIENT = ("activations", "logits", "workspace")
PARTS = PERSISTENT + TRANSIENT
# Divided weights that are whole in these phases, in place of two blocks.
GATHERED = {"start": "embedding", "loss": "head", "gradient of the loss": "head"}
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
SHARED = Path(__file__).parents[2]


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


def serve() -> None:
    """Answer questions until there are no more: the main loop of the dry run's process."""
    answers, sys.stdout = sys.stdout, sys.stderr  # no library shall write among the answers
    with quick_imports():
        import stages.shared.model.loading  # noqa: F401, PLC0415  (before peft)
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
        if not DryRun.users and DryRun.process is not None:
            DryRun.process.kill()  # it holds nothing
            DryRun.process.communicate()
            DryRun.process = None

    def model(self) -> dict[str, Any]:
        """Sizes of the model: see `fake_model.describe`."""
        return self._answer()

    def persistent(self, setup: TrainingSetup) -> dict[str, Any]:
        """Bytes held from step to step: see `persistent_bytes`; and `dry_run.unfused_because`."""
        return self._answer(replace(setup, gradient_checkpointing=False))

    def predict(self, setup: TrainingSetup, batch: MicroBatch, shards: int = 1) -> Prediction:
        """The peak of a step of more than one micro-batch, the largest of them this one.

        `shards`: devices that matrices are divided among.
        """
        return _largest(self.persistent(setup), self._answer(setup, batch), shards)

    def predict_scoring(
        self, setup: TrainingSetup, batch: MicroBatch, shards: int = 1
    ) -> Prediction:
        """The peak of scoring held-out conversations between two steps: there are no gradients.

        Of a full fine-tune the weights are scored as their file will hold them: copies.
        """
        held = self.persistent(setup)
        copied = held["trainable"] + _saved(held["divided_gradients"], shards) // 4
        copies = copied * DENSE_BYTES[setup.compute] if setup.rounds_masters else 0
        held |= {"gradients": 0, "divided_gradients": 0}
        scored = replace(setup, gradient_checkpointing=False, masters=not copies)
        peak = _largest(held, self._answer(scored, batch, scoring=True), shards)
        parts = peak.parts | {"workspace": peak.parts["workspace"] + copies}
        return Prediction(parts, f"scoring, {peak.phase}")

    def _answer(
        self,
        setup: TrainingSetup | None = None,
        batch: MicroBatch | None = None,
        *,
        scoring: bool = False,
    ) -> dict[str, Any]:
        question: dict[str, Any] = {"scoring": scoring}
        question |= {"setup": setup and asdict(setup), "batch": batch and asdict(batch)}
        try:
            config = json.loads(self.config.read_bytes())
        except (OSError, ValueError, RecursionError):
            config = None  # the dry run says what is wrong with it
        key = json.dumps([question, config, _environment()], sort_keys=True)
        path = root() / ".counts" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            answer = DryRun.ask({**question, "config": str(self.config.absolute())})
        path.parent.mkdir(exist_ok=True)
        files.write_json(path, answer)  # whole or not at all: two may write the same
        return answer


@cache
def _environment() -> list[str]:
    """Versions of libraries, and the hash of the shared code: a count depends on both."""
    code = hashlib.sha256()
    for path in sorted(SHARED.rglob("*.py")):
        code.update(path.read_bytes())
    return [*(f"{name} {version(name)}" for name in LIBRARIES), code.hexdigest()]


def _largest(held: dict[str, Any], phases: dict[str, dict[str, int]], shards: int) -> Prediction:
    """The phase that holds most, with the persistent bytes."""
    predictions = []
    for phase, transient in phases.items():
        parts = {name: held[name] for name in PERSISTENT} | transient
        if shards > 1:
            _divide(parts, held, phase, shards)
        predictions.append(Prediction(parts, phase))
    return max(predictions, key=lambda one: one.total_bytes)


def _divide(parts: dict[str, int], held: dict[str, Any], phase: str, shards: int) -> None:
    """Change a phase's parts to those of one of several devices that divide matrices."""
    if phase == "update" and held["divided_states"]:  # of a part at a time, not a matrix
        part = held["largest_unit"] / shards
        parts |= {name: int(parts[name] * part / held["largest_matrix"]) for name in TRANSIENT}
    block = held["largest_block"]
    gathered = held[GATHERED[phase]] if phase in GATHERED else 2 * block
    divided = (held["blocks"], held["embedding"], held["untied_head"])
    parts["weights"] += gathered + sum(_saved(size, shards) for size in divided)
    parts["gradients"] += _saved(held["divided_gradients"], shards)
    parts["optimizer"] += _saved(held["divided_states"], shards)
    if not held["divided_gradients"]:
        return
    if phase == "gradient of the loss":  # whole until it is scattered, as a block's is
        parts["gradients"] += held["head"]
    elif phase.startswith("backward pass of block 1 "):
        parts["gradients"] += max(block, held["embedding"])
    elif phase.startswith("backward"):
        parts["gradients"] += block


def _saved(size: int, shards: int) -> int:
    """Bytes more, less than none, on a device that holds its part of `size` bytes."""
    return -(-size // shards) - size
