"""The loop: a step, an evaluation where one is due, a checkpoint where one is due.

Where the loop stands is its step and what the curve holds, so that it may be entered anywhere: a
training that goes on from a checkpoint is the same loop, begun later.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from stages.shared import heap, scoring
from stages.shared.core import files, progress
from stages.shared.core.errors import Stopped, UserError
from stages.shared.examples import Example
from stages.shared.step import adapter, optim
from stages.shared.step.config import Train
from stages.train import gradient
from stages.train.checkpoints import Checkpoints
from stages.train.computing import Computing, peak_memory_bytes
from stages.train.curve import Curve
from stages.train.gradient import StepSize
from stages.train.helpers import Helpers
from stages.train.interruption import Interrupted, Interruption
from stages.train.processes import Processes
from stages.train.steps import Steps


@dataclass(frozen=True)
class Data:
    """The conversations that are learnt, and those that are held out."""

    train: list[Example]
    held_out: list[Example]


class Loop:
    """A training, from wherever it stands to its end."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        data: Data,
        params: Train,
        computing: Computing,
        processes: Processes,
        checkpoints: Checkpoints,
        checkpoint_every: int,
        helpers: Helpers | None = None,
    ) -> None:
        self.model, self.data, self.params = model, data, params
        self.computing, self.processes, self.helpers = computing, processes, helpers
        self.checkpoints, self.checkpoint_every = checkpoints, checkpoint_every
        self.steps = Steps.of(params, len(data.train))
        self.optimizer = optim.make_optimizer(model, params, computing.device)
        self.scheduler = optim.make_scheduler(self.optimizer, params, self.steps.total)
        # fp16 has too few exponents for small gradients: on a GPU the loss is scaled up.
        self.scaler = torch.amp.GradScaler(
            computing.device.type,
            enabled=computing.device.type == "cuda" and computing.dtype == torch.float16,
        )
        self.done = 0  # optimizer steps
        self.curve = Curve()
        self.size = StepSize()
        self.seconds = 0.0  # in steps, evaluations and checkpoints left out
        self.resumed_from: int | None = None
        self.checkpointed: int | None = None

    def run(self) -> None:
        """Train to the end, or to a signal.

        Raises:
            Stopped: by a signal; a checkpoint holds all that was done.
            UserError: a loss or a gradient is not finite; earlier checkpoints stay.
        """
        with self._bar() as bar, Interruption() as stop:
            while True:
                try:
                    if self._evaluation_is_due():
                        self._evaluate(stop)
                    if self._stops(stop):
                        break
                    if self._checkpoint_is_due():
                        self._checkpoint()
                    if self._is_finished():
                        return
                    self._give_back_freed_memory()
                    loss = self._step(stop)
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update()
                except Interrupted:
                    break
            self._checkpoint()
            raise self._stopped(stop)

    def load(self, state: dict[str, Any]) -> None:
        """Stand where a checkpoint was written."""
        learning = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in state["weights"].items():
                learning[name].copy_(weight)
        optim.restore(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.done = self.resumed_from = self.checkpointed = state["step"]
        self.curve = Curve(**state["curve"])
        self.size = StepSize(**state["size"])
        self.seconds = state["seconds"]

    def peak_memory_bytes(self) -> int:
        """The most that was held, by the helpers too."""
        own = peak_memory_bytes(self.computing.device)
        return own + (self.helpers.peak_bytes() if self.helpers else 0)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.done,
            "weights": {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "curve": asdict(self.curve),
            "size": asdict(self.size),
            "seconds": self.seconds,
        }

    def _step(self, stop: Interruption) -> float:
        started = time.perf_counter()
        rows = self.steps.drawn(self.done)
        self.model.train()
        self.steps.set_random_state(self.done, self.processes.rank)
        with self._repeatable(stop):
            loss, size = gradient.accumulate(
                self.model,
                [self.data.train[row] for row in rows],
                self.computing,
                self.processes,
                self.scaler,
                self.helpers,
            )
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.requires_grad], self.params.max_grad_norm
        ).item()
        rate = self.optimizer.param_groups[0]["lr"]
        self._refuse_nonfinite(loss, norm, rate, rows)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)  # no evaluation has to stand beside gradients
        self.done += 1
        self.curve.record(
            self.done,
            epoch=self.steps.epochs_after(self.done),
            learning_rate=rate,
            loss=loss,
            gradient_norm=norm,
        )
        self.size += size
        self.seconds += time.perf_counter() - started
        return loss

    def _give_back_freed_memory(self) -> None:
        """On a CPU, so that what the process holds stays near what its tensors need."""
        helpers, predicted = self.helpers, self.computing.predicted_bytes
        limit = helpers.resident_limit if helpers else predicted
        if self.computing.device.type == "cpu" and limit:
            heap.trim_above(limit)

    def _refuse_nonfinite(self, loss: float, norm: float, rate: float, rows: list[int]) -> None:
        """Before the optimizer has touched a weight."""
        overflow_is_expected = self.scaler.is_enabled()  # the scaler skips such a step
        if math.isfinite(loss) and (math.isfinite(norm) or overflow_is_expected):
            return
        name, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        raise UserError(
            f"training stopped at step {self.done + 1}: the {name} is {value}, expected a finite "
            f"number; learning rate {rate:.3g}, rows {', '.join(map(str, rows))} of "
            "data/prepared/train.parquet; lower train.learning_rate or look at these rows"
        )

    def _evaluation_is_due(self) -> bool:
        every = self.params.eval_steps or self.steps.per_epoch
        due = self.done % every == 0 or self.done == self.steps.total
        return due and not self.curve.evaluated(self.done)

    def _evaluate(self, stop: Interruption) -> None:
        """Score with the evaluator's scorer; keep the weights if they are the best so far."""
        computing = self.computing
        with adapter.as_saved(self.model, computing.kept, computing.dtype):
            with self._repeatable(stop):
                sums, tokens = scoring.score(
                    self.model,
                    self.data.held_out,
                    computing.device,
                    computing.dtype,
                    "held-out loss",
                    self.processes.share,
                )
            scored = torch.from_numpy(sums).to(computing.device)
            self.processes.add_up([scored])
        loss = scoring.mean_loss(scored.cpu().numpy(), tokens)
        if not math.isfinite(loss):
            raise UserError(
                f"training stopped after step {self.done}: the held-out loss is {loss}, expected a "
                "finite number; lower train.learning_rate, or at step 0 look at the base model"
            )
        if loss < self.curve.best_loss and self.processes.leads:
            with files.whole_folder(self.checkpoints.best) as partial:
                adapter.save(self.model, partial, computing.kept)
        self.curve.record_evaluation(self.done, self.steps.epochs_after(self.done), loss)

    def _repeatable(self, stop: Interruption) -> AbstractContextManager[None]:
        """Several processes end no work halfway: each waits for the others' part of it."""
        return stop.at_once() if self.processes.size == 1 else nullcontext()

    def _stops(self, stop: Interruption) -> bool:
        """Whether any process has heard a signal: they stop at the same step."""
        return self.processes.any(stop.heard is not None, self.computing.device)

    def _is_finished(self) -> bool:
        out_of_patience = self.curve.evaluations_since_best >= self.params.patience
        return self.done == self.steps.total or out_of_patience

    def _checkpoint_is_due(self) -> bool:
        due = self.done > 0 and self.done % self.checkpoint_every == 0
        return due or self._is_finished()

    def _checkpoint(self) -> None:
        """Write one, unless this very step has one."""
        if self.checkpointed == self.done:
            return
        if self.processes.leads:
            self.checkpoints.write(self.done, self._state(), self.computing.noted)
        self.processes.wait()
        self.checkpointed = self.done

    def _stopped(self, stop: Interruption) -> Stopped:
        return Stopped(
            f"training was ended by {stop.heard.name if stop.heard else 'a signal'} after step "
            f"{self.done} of {self.steps.total}; {self.checkpoints.folder} holds all of them; "
            "`dvc repro` goes on from there",
            stop.heard or 15,
        )

    def _bar(self) -> Any:
        return progress.bar(total=self.steps.total, desc="train", unit="step", initial=self.done)
