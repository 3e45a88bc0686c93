"""QLoRA training, top to bottom: set up, loop, step, evaluate, checkpoint, save.

The base model is frozen, its linear layers quantized to 4 bits. Beside each lies a LoRA adapter,
two small matrices in fp32, and AdamW updates these alone. A step takes `train.batch_size`
conversations, packed end to end into micro-batches. Its loss is the mean over the supervised tokens
of all of them (by weight, where the data has weights), whichever micro-batch or process computed
it. Held-out conversations are scored before the first step and when an evaluation is due; the
weights of the best evaluation are kept. All randomness is a function of the seed and the step, so
that a training resumed from a checkpoint ends with the same bytes.

Source: Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.shared.core import display, files
from stages.shared.core.errors import UserError
from stages.shared.core.machine import machine
from stages.shared.model import packing, scoring
from stages.shared.model.packing import Example
from stages.shared.parallel.group import Group
from stages.shared.parallel.interruption import Interrupted, Interruption
from stages.shared.parallel.shards import Shards
from stages.shared.step import adapter, gradient, optim, router_loss
from stages.shared.step.config import Train
from stages.shared.step.fused.patch import fuse
from stages.shared.step.router_loss import RouterLoss
from stages.shared.weights import experts
from stages.train.checkpoints import Checkpoints, Tensors, load_tensors, tensors_of
from stages.train.config import Params, Schedule
from stages.train.execution import ExecutionPlan
from stages.train.metrics import History, token_counts

if TYPE_CHECKING:  # at run time stages.shared.model is imported before these
    from peft import PeftModel
    from transformers import PreTrainedModel

# Paths of `train` and `eval` conversations, the `model`, and its `original` weights (for LoftQ).
Inputs = Mapping[str, Path]


@dataclass(frozen=True)
class Data:
    """Tokenized conversations of both splits."""

    train: list[Example]
    held_out: list[Example]

    @classmethod
    def read(cls, inputs: Inputs) -> "Data":
        """Read both splits."""
        return cls(packing.read_examples(inputs["train"]), packing.read_examples(inputs["eval"]))


def load_model(
    settings: Params, inputs: Inputs, device: torch.device, sharded: bool = False
) -> "PreTrainedModel | PeftModel":
    """Load the frozen, quantized base with a fresh adapter; in full fine-tuning, fp32 masters.

    A model that will be `sharded` stays memory-mapped on the CPU.
    """
    torch.manual_seed(settings.train.seed)  # before the adapter's random matrices are drawn
    if settings.train.method == "full":
        return adapter.load_for_full(inputs["model"], device, on_cpu=sharded)
    original = inputs.get("original")
    return adapter.load_for_lora(inputs["model"], settings.lora, device, original, on_cpu=sharded)


class Recipe:
    """State of a training: the model, its optimizer and schedule, and the history.

    A resumed training is the same loop, entered at a later `step`.
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        data: Data,
        params: Train,
        plan: ExecutionPlan,
        checkpoints: Checkpoints,
        group: Group,
    ) -> None:
        """Set up fused modules, sharding, optimizer and schedule."""
        self.model, self.data, self.params, self.plan = model, data, params, plan
        self.checkpoints, self.group = checkpoints, group
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.trainable_parameters = sum(p.numel() for p in trainable)

        if plan.fused:
            fuse(model)
        full = params.method == "full"
        self.shards = Shards(model, group, plan.device, trained=full) if plan.sharded else None
        if plan.gradient_checkpointing:
            model.config.use_cache = False
            model.activation_checkpointing_enable({"use_reentrant": False})
        # Sharded full fine-tuning trains this process's part of each matrix, and vectors whole.
        self.sharded = self.shards.matrices if self.shards else {}
        self.parts = self.shards.trained if self.shards else []
        self.whole = [p for p in trainable if p not in self.sharded]

        self.schedule = Schedule(params, len(data.train))
        self.optimizer = optim.make_optimizer([*self.whole, *self.parts], params, plan.device)
        self.scheduler = optim.make_scheduler(self.optimizer, params, self.schedule.total)
        # fp16 has too few exponents for small gradients: on a GPU the loss is scaled up.
        fp16 = plan.device.type == "cuda" and plan.compute_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=fp16)
        weight = router_loss.weight_of(model.config, params.router_aux_loss)
        self.router = RouterLoss(model, weight) if weight else None  # of a mixture of experts

        self.step = 0  # optimizer steps that are done
        self.history = History()
        self.counts = Counter[str]()  # tokens
        self.seconds = 0.0  # in steps; evaluations and checkpoints are left out
        self.resumed_from: int | None = None
        self.checkpointed: int | None = None

    # ------------------------------------------------------------------------------------- loop

    def run(self, stop: Interruption) -> None:
        """Train to the end, or to a signal."""
        total = self.schedule.total
        with display.bar(total=total, desc="train", unit="step", initial=self.step) as bar:
            while True:
                try:
                    if self._evaluation_is_due():
                        self.evaluate(stop)
                    if any(self.group.gather(stop.heard is not None)):
                        break
                    if self._checkpoint_is_due():
                        self.checkpoint()
                    if self._is_finished():
                        return
                    loss = self.take_step(stop)
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update()
                except Interrupted:
                    break
        if not self.history.rows:
            raise stop.stopped("training", "in its first evaluation; `dvc repro` starts it again")
        self.checkpoint()
        raise stop.stopped(
            "training",
            f"after step {self.step} of {total}; {self.checkpoints.folder} holds all of them; "
            "`dvc repro` goes on from there",
        )

    def _evaluation_is_due(self) -> bool:
        every = self.params.eval_steps or self.schedule.per_epoch
        due = self.step % every == 0 or self.step == self.schedule.total
        return due and not self.history.evaluated(self.step)

    def _checkpoint_is_due(self) -> bool:
        return self._is_finished() or self.step % machine().checkpoint_steps == 0 < self.step

    def _is_finished(self) -> bool:
        out_of_patience = self.history.evaluations_since_best >= self.params.patience
        return self.step == self.schedule.total or out_of_patience

    def _repeatable(self, stop: Interruption) -> AbstractContextManager[None]:
        """Context of work that changes no weight: on one device a signal aborts it at once."""
        return stop.at_once() if self.group.size == 1 else nullcontext()

    # ------------------------------------------------------------------------------------- step

    def take_step(self, stop: Interruption) -> float:
        """Gradient, clipping, AdamW, schedule; returns the loss, nats a supervised token."""
        started = time.perf_counter()
        with self._repeatable(stop):
            loss, counts = self.backward()
        self.scaler.unscale_(self.optimizer)
        limit, all_reduce = self.params.max_grad_norm, self.group.all_reduce
        norm = gradient.clip(self.whole, self.parts, limit, all_reduce)
        rate = self.optimizer.param_groups[0]["lr"]
        self._refuse_nonfinite(loss, norm, rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)  # an evaluation needs the memory

        self.step += 1
        self.counts.update(counts)
        self.seconds += time.perf_counter() - started
        self.history.record(
            self.step,
            epoch=self.step / self.schedule.per_epoch,
            learning_rate=rate,
            loss=loss,
            gradient_norm=norm,
            **({"router_aux_loss": self.router.total.item()} if self.router else {}),
        )
        self._write_history()
        return loss

    def backward(self) -> tuple[float, Counter[str]]:
        """Gradient of the step's mean loss, summed over the group, in the parameters' `grad`."""
        self.plan.trim_heap()
        self.model.train()
        torch.manual_seed(self.schedule.seed(self.step, self.group.rank))  # of dropout
        examples = [self.data.train[row] for row in self.schedule.rows(self.step)]
        limit = self.plan.micro_batch_tokens
        packs = self.group.size == 1 or packing.may_pack(self.model.config)
        parts = packing.partition(examples, limit if packs else 1, self.group.size)
        loss = gradient.accumulate(
            self.model,
            packing.even_passes(parts, packs)[self.group.rank],
            sum(example.loss_weight for example in examples),
            dtype=self.plan.compute_dtype,
            fused=self.plan.fused,
            scaler=self.scaler,
            all_reduce=self.group.all_reduce,
            router=self.router,
            scattered=self.sharded,
        )
        return loss.item(), token_counts(examples, list(chain(*parts)), limit)

    def _refuse_nonfinite(self, loss: float, norm: float, rate: float) -> None:
        """Stop before the optimizer has touched a weight."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
            return  # a scaler skips the steps that overflow
        name, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        rows = ", ".join(map(str, self.schedule.rows(self.step)))
        raise UserError(
            f"training stopped at step {self.step + 1}: the {name} is {value}; learning rate "
            f"{rate:.3g}, rows {rows} of data/prepared/train.parquet. Lower train.learning_rate, "
            "or look at these rows."
        )

    # --------------------------------------------------------------------------------- evaluate

    def evaluate(self, stop: Interruption) -> None:
        """Score with the evaluator's scorer; keep the weights if they are the best so far.

        Meanwhile the weights have the values that their file will hold.
        """
        device, dtypes = self.plan.device, (self.plan.storage_dtype, self.plan.compute_dtype)
        shards_as_saved = self.shards.as_saved(*dtypes) if self.shards else nullcontext()
        with shards_as_saved, adapter.as_saved(self.model, *dtypes):
            share = self.group.rank, self.group.size
            with self._repeatable(stop), experts.counted(self.model) as use:
                sums, tokens = scoring.score(
                    self.model, self.data.held_out, device, dtypes[1], "held-out loss", share
                )
            scored, use = torch.from_numpy(sums).to(device), use.to(device)
            self.group.all_reduce([scored, *([use] if use.numel() else [])])
            loss = scoring.mean_loss(scored.cpu().numpy(), tokens)
            if not math.isfinite(loss):
                raise UserError(
                    f"training stopped after step {self.step}: the held-out loss is {loss}. Lower "
                    "train.learning_rate, or at step 0 look at the base model."
                )
            if loss < self.history.best_loss:
                self._save_best()
        epoch = self.step / self.schedule.per_epoch
        self.history.record_evaluation(self.step, epoch, loss, use.tolist())
        self._write_history()

    def _write_history(self) -> None:
        """Write the loss curve so far."""
        if self.group.is_main:
            self.history.write(self.checkpoints.folder / "loss.csv")

    # ------------------------------------------------------------------------------- checkpoint

    def checkpoint(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.checkpointed != self.step:
            tensors = tensors_of(self.model, self.optimizer, self.shards)
            if self.group.is_main:
                self.checkpoints.write(self.step, self._state(), self.plan.saved, tensors)
            for _ in tensors:  # which all processes gather
                pass
        self.checkpointed = self.step

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "groups": self.optimizer.state_dict()["param_groups"],
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": asdict(self.history),
            "counts": dict(self.counts),
            "seconds": self.seconds,
        }

    def load_state(self, state: dict[str, Any], tensors: Iterable[Tensors]) -> None:
        """Restore the state of a checkpoint."""
        load_tensors(self.model, self.optimizer, state["groups"], self.shards, tensors)
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = self.resumed_from = self.checkpointed = state["step"]
        self.history = History(**state["history"])
        self.counts = Counter(state["counts"])
        self.seconds = state["seconds"]

    # ------------------------------------------------------------------------------------- save

    def _save_best(self) -> None:
        """Write the weights as `best`; the first process gathers those that are sharded."""
        dtype, is_main = self.plan.storage_dtype, self.group.is_main
        gathered = {
            matrix: values["weight"].view(matrix.shape).to(dtype)
            for some in (self.shards.gather() if self.shards else ())
            for matrix, values in some.items()
            if is_main
        }
        if is_main:
            with files.whole_folder(self.checkpoints.best) as folder:
                adapter.save(self.model, folder, dtype, gathered)
