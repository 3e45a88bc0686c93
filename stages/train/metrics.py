"""Metrics of a training: loss by step, best evaluation, counts of tokens, and the machine."""

import csv
import os
import platform
import resource
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.shared.core import files
from stages.shared.model import packing
from stages.shared.model.packing import Example
from stages.shared.step import targets
from stages.shared.step.fused import gpu
from stages.shared.weights import experts
from stages.train.checkpoints import versions

if TYPE_CHECKING:
    from stages.train.recipe import Recipe

COLUMNS = ("step", "epoch", "learning_rate", "loss", "eval_loss", "gradient_norm")
OF_MIXTURES = ("router_aux_loss",)  # columns that only they have


@dataclass
class History:
    """Losses by optimizer step, nats a supervised token; step 0 is before training."""

    rows: dict[int, dict[str, float]] = field(default_factory=dict)  # by step: `COLUMNS`
    best_step: int = 0
    best_loss: float = float("inf")
    evaluations_since_best: int = 0
    # Of a mixture, held-out tokens by layer and expert, `before` training and `after`, at the best.
    expert_use: dict[str, list[list[int]]] = field(default_factory=dict)

    def record(self, step: int, **values: float) -> None:
        """Add values to a step's row."""
        self.rows.setdefault(step, {"step": step}).update(values)

    def record_evaluation(
        self, step: int, epoch: float, eval_loss: float, expert_use: list[list[int]]
    ) -> None:
        """Add an evaluation, which may be the best so far."""
        self.record(step, epoch=epoch, eval_loss=eval_loss)
        if expert_use:
            self.expert_use.setdefault("before", expert_use)
        if eval_loss < self.best_loss:
            if expert_use:
                self.expert_use["after"] = expert_use
            self.best_step, self.best_loss, self.evaluations_since_best = step, eval_loss, 0
        else:
            self.evaluations_since_best += 1

    def evaluated(self, step: int) -> bool:
        """Whether this step has been evaluated."""
        return "eval_loss" in self.rows.get(step, {})

    def mean(self, column: str, until: int, last: int) -> float | None:
        """The mean of a column over the `last` steps up to `until`; None if it has no value."""
        steps = range(max(1, until - last + 1), until + 1)
        values = [self.rows[step][column] for step in steps if column in self.rows[step]]
        return sum(values) / len(values) if values else None

    def write(self, path: Path) -> None:
        """Write the rows as CSV, a value that was not measured left empty."""
        with files.whole_file(path) as partial, partial.open("w", newline="") as file:
            measured = {column for row in self.rows.values() for column in row}
            columns = [*COLUMNS, *(c for c in OF_MIXTURES if c in measured)]
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for step in sorted(self.rows):
                row = self.rows[step].items()
                writer.writerow({k: v if k == "learning_rate" else round(v, 6) for k, v in row})


def token_counts(
    examples: Sequence[Example], micro_batches: Sequence[Sequence[Example]], limit: int
) -> Counter[str]:
    """Tokens of one step over all processes, in micro-batches of at most `limit`."""
    computed = list(map(packing.input_tokens, micro_batches))
    return Counter(
        tokens=sum(map(len, examples)),
        # Up to the last one that predicts a supervised one; computed ones are with padding.
        input_tokens=packing.input_tokens(examples),
        supervised_tokens=sum(e.supervised_tokens for e in examples),
        computed_tokens=sum(computed),
        capacity_tokens=sum(max(limit, tokens) for tokens in computed),
    )


def metrics_of(training: "Recipe") -> dict[str, Any]:
    """Metrics of `reports/train.json` and `reports/details/train.json`."""
    history, plan, counts = training.history, training.plan, training.counts
    loss = history.mean("loss", history.best_step, training.schedule.per_epoch)
    # Weights act on the training loss alone.
    weighted = any(example.weights is not None for example in training.data.train)
    path = f"stock: {plan.unfused_because}"
    if plan.fused:
        path = "fused, liger-kernel" if gpu.uses_liger(plan.device) else "fused"
    return {
        "trainable_parameters": training.trainable_parameters,
        **_mixture(training),
        "steps": training.step,
        "loss": loss,
        "eval_loss": history.best_loss,
        "generalization_gap": None if loss is None or weighted else history.best_loss - loss,
        "best_step": history.best_step,
        "best_epoch": history.rows[history.best_step]["epoch"],
        "stopped_early": training.step < training.schedule.total,
        "peak_memory_bytes": _peak_memory_bytes(training),
        "predicted_memory_bytes": plan.predicted_bytes,
        "tokens_per_second": round(counts["tokens"] / training.seconds, 1),
        "supervised_tokens_per_second": round(counts["supervised_tokens"] / training.seconds, 1),
        "padding_fraction": 1 - counts["input_tokens"] / counts["computed_tokens"],
        "packing_efficiency": round(counts["input_tokens"] / counts["capacity_tokens"], 4),
        "device": plan.device.type,
        "devices": plan.processes,
        "optimizer": type(training.optimizer).__name__,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "path": path,
        "checkpoint_bytes": training.checkpoints.newest_bytes(),
        "resumed_from_step": training.resumed_from,
        "environment": _environment(plan.device),
    }


def _peak_memory_bytes(training: "Recipe") -> int:
    """Of the first GPU, by torch's allocator; of a CPU, resident in all processes together."""
    device = training.plan.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    training.group.all_reduce([peak])
    return int(peak)


def _mixture(training: "Recipe") -> dict[str, Any]:
    """Metrics of a mixture: trained kinds, load-balancing loss, use of experts."""
    if not experts.layers(training.model):
        return {}
    history, router = training.history, training.router
    loss = history.mean("router_aux_loss", history.best_step, training.schedule.per_epoch)
    return {
        "trainable_by_kind": targets.trainable_by_kind(training.model),
        "router_aux_loss": {"weight": router.weight if router else 0.0, "loss": loss},
        "expert_use": {when: _expert_use(use) for when, use in history.expert_use.items()},
    }


def _expert_use(tokens: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Shares of a layer's tokens by expert; `largest` is relative to an even share."""
    shares = [[round(n / sum(layer), 5) for n in layer] for layer in tokens]
    return {
        "idle": sum(n == 0 for layer in tokens for n in layer),
        "largest": max(round(max(layer) * len(layer) / sum(layer), 3) for layer in tokens),
        "shares": shares,
    }


def _environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads; with the same, and the same plan, training is repeatable."""
    on_gpu = device.type == "cuda"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processors = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_gpu else next(processors, "unknown"),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda if on_gpu else None,
    }
