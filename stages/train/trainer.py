"""The Trainer of transformers, where one item of the loader is one optimizer step."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from stages.shared import packing, progress, scoring
from stages.shared.errors import UserError
from stages.shared.examples import Example
from stages.shared.precision import autocast
from stages.train import trainable
from stages.train.computing import Computing
from stages.train.curve import Curve
from stages.train.settings import Train
from stages.train.steps import StepLoader, total_steps


class StepTrainer(Trainer):
    """Trains on lists of conversations, scores with the evaluator's scorer, and keeps the best.

    A step's conversations are packed into micro-batches of at most `micro_batch_tokens` tokens;
    their losses are summed and divided by the number of supervised tokens in the whole step. So
    the gradient of a step does not depend on how it was divided.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        train: list[Example],
        held_out: list[Example],
        params: Train,
        computing: Computing,
        dtype: torch.dtype,
        keep: Path,
    ) -> None:
        self.trained, self.examples, self.held_out = model, train, held_out
        self.params, self.computing, self.dtype, self.keep = params, computing, dtype, keep
        self.curve = Curve()
        self.seconds = 0.0
        self.tokens = self.supervised_tokens = 0
        super().__init__(
            model=model,
            args=_arguments(params, computing, dtype, len(train), keep),
            eval_dataset=held_out,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.progress = progress.bar(total=self.args.max_steps, desc="train", unit="step")

    def get_train_dataloader(self) -> StepLoader:
        """Our own loader, not accelerate's: its sharding would pad the last step of an epoch."""
        return StepLoader(self.examples, self.params.batch_size, self.params.seed)

    def training_step(
        self,
        model: nn.Module,
        inputs: list[Example],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Add up the gradients of one optimizer step; returns its loss, nats a supervised token."""
        started = time.perf_counter()
        model.train()
        supervised = sum(example.supervised_tokens for example in inputs)
        total = torch.zeros((), device=self.computing.device)
        for micro_batch in packing.split(inputs, self.computing.micro_batch_tokens):
            batch = packing.pack(micro_batch, self.computing.device)
            with autocast(self.computing.device, self.dtype):
                losses = scoring.negative_log_likelihoods(model, batch)
            loss = losses.sum() / supervised
            self.accelerator.backward(loss)
            total += loss.detach()
        self._refuse_nonfinite(total, inputs)
        self.seconds += time.perf_counter() - started
        self.tokens += sum(map(len, inputs))
        self.supervised_tokens += supervised
        return total

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the held-out conversations; keep the weights if they are the best so far."""
        if self.curve.evaluated(self.state.global_step):
            return {"eval_loss": self.curve.rows[self.state.global_step]["eval_loss"]}
        with trainable.as_saved(self.trained, self.dtype):
            sums, tokens = scoring.score(
                self.trained, self.held_out, self.computing.device, self.dtype, "held-out loss"
            )
        loss = scoring.mean_loss(sums, tokens)
        step, epoch = self.state.global_step, float(self.state.epoch or 0)
        if self.curve.record_evaluation(step, epoch, loss):
            trainable.save(self.trained, self.keep, self.dtype)
        elif self.curve.evaluations_since_best >= self.params.patience:
            self.control.should_training_stop = True
        return {"eval_loss": loss}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record a step in the curve, and show it."""
        if "learning_rate" not in logs:
            return
        self.curve.record(
            self.state.global_step,
            epoch=float(self.state.epoch or 0),
            learning_rate=logs["learning_rate"],
            loss=logs["loss"],
            gradient_norm=logs["grad_norm"],
        )
        self.progress.update(self.state.global_step - self.progress.n)
        self.progress.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer would look for a tensor in our list."""
        return 0

    def _refuse_nonfinite(self, loss: torch.Tensor, inputs: list[Example]) -> None:
        if math.isfinite(loss.item()):
            return
        rows = ", ".join(str(example.row) for example in inputs)
        raise UserError(
            f"training stopped at step {self.state.global_step + 1}: the loss is {loss.item()}, "
            f"expected a finite number; learning rate {self._get_learning_rate():.3g}, rows {rows} "
            "of data/prepared/train.parquet; lower train.learning_rate or look at these rows"
        )


def _arguments(
    params: Train, computing: Computing, dtype: torch.dtype, conversations: int, folder: Path
) -> TrainingArguments:
    on_gpu = computing.device.type == "cuda"
    name = {"adamw": "paged_adamw_32bit", "adamw_8bit": "paged_adamw_8bit"}[params.optimizer]
    if not on_gpu:
        name = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit"}[params.optimizer]
    by_epoch = params.eval_steps is None
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=total_steps(conversations, params.batch_size, params.epochs, params.max_steps),
        per_device_train_batch_size=1,
        learning_rate=params.learning_rate,
        lr_scheduler_type="constant_with_warmup"
        if params.scheduler == "constant"
        else params.scheduler,
        warmup_steps=params.warmup,  # below 1: a fraction of the steps
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        optim=name,
        eval_strategy="epoch" if by_epoch else "steps",
        eval_steps=params.eval_steps,
        eval_on_start=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=params.seed,
        use_cpu=not on_gpu,
        fp16=on_gpu and dtype == torch.float16,  # accelerate scales the loss
        activation_checkpointing=computing.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        label_names=["labels"],
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # never torch's DataParallel
    return arguments
