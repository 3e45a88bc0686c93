"""Metrics of a training: its losses and counts, and how and where it was computed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from stages.shared.step import targets
from stages.shared.step.fused import gpu
from stages.shared.weights import experts
from stages.train import execution

if TYPE_CHECKING:
    from stages.train.recipe import Recipe


def metrics_of(training: "Recipe") -> dict[str, Any]:
    """Metrics of `reports/train.json` and `reports/details/train.json`."""
    history, plan, counts = training.history, training.plan, training.counts
    loss = history.train_loss(history.best_step, training.schedule.per_epoch)
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
        "tokens_per_second": round(counts.tokens / training.seconds, 1),
        "supervised_tokens_per_second": round(counts.supervised_tokens / training.seconds, 1),
        "padding_fraction": 1 - counts.input_tokens / counts.computed_tokens,
        "packing_efficiency": round(counts.input_tokens / counts.capacity_tokens, 4),
        "device": plan.device.type,
        "devices": plan.processes,
        "optimizer": type(training.optimizer).__name__,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "path": path,
        "checkpoint_bytes": training.checkpoints.newest_bytes(),
        "resumed_from_step": training.resumed_from,
    }


def _peak_memory_bytes(training: "Recipe") -> int:
    """Of the first device; of a CPU, which they share, the sum of all processes."""
    device = training.plan.device
    peak = torch.tensor(execution.peak_memory_bytes(device), device=device)
    if device.type == "cpu":
        training.group.all_reduce([peak])
    return int(peak)


def _mixture(training: "Recipe") -> dict[str, Any]:
    """Metrics of a mixture: trained kinds, load-balancing loss, use of experts."""
    if not experts.layers(training.model):
        return {}
    history = training.history
    loss = history.mean("router_aux_loss", history.best_step, training.schedule.per_epoch)
    return {
        "trainable_by_kind": targets.trainable_by_kind(training.model),
        "router_aux_loss": {
            "weight": training.router.weight if training.router else 0.0,
            "loss": loss,
        },
        "expert_use": {when: expert_use(use) for when, use in history.expert_use.items()},
    }


def expert_use(tokens: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Shares of the tokens that went to each expert of a layer.

    `idle` experts got none; `largest` is the largest share, in even shares.
    """
    shares = [[round(n / sum(layer), 5) for n in layer] for layer in tokens]
    return {
        "idle": sum(n == 0 for layer in tokens for n in layer),
        "largest": max(round(max(layer) * len(layer) / sum(layer), 3) for layer in tokens),
        "shares": shares,
    }
