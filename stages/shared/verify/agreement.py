"""Agreement of two models' predictions on held-out conversations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from stages.shared.core.errors import UserError
from stages.shared.model import scoring
from stages.shared.model.packing import Example, Packed

ROWS = 16  # compared at a time, in a core's cache: four times as fast as a whole batch


@dataclass(frozen=True)
class Agreement:
    """KL divergence and top-1 agreement of two models."""

    kl_divergence: float  # mean KL(first ‖ second), nats per token
    top1_agreement: float  # fraction of positions
    positions: int


def first_positions(examples: Sequence[Example], positions: int) -> list[Example]:
    """The first conversations, up to `positions` supervised tokens."""
    totals = accumulate(example.supervised_tokens for example in examples)
    return list(examples[: max(1, sum(total <= positions for total in totals))])


def log_probabilities(*inputs: Any) -> list[torch.Tensor]:
    """Log-probabilities at supervised positions, fp32 [supervised, vocabulary] per batch.

    `inputs` as of `scoring.forward_batches`, from the model on.
    """
    return [result for _, result in scoring.forward_batches(_log_probabilities, *inputs)]


def _log_probabilities(model: nn.Module, batch: Packed) -> torch.Tensor:
    return scoring.supervised_logits(model, batch).float().log_softmax(-1).cpu()


def compare(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> Agreement:
    """Compare two models' log-probabilities, which must be finite."""
    divergence, equal, positions = 0.0, 0, 0
    for batches in zip(first, second, strict=True):
        sums = []
        for x, y in zip(*(batch.split(ROWS) for batch in batches), strict=True):
            p = x.exp()  # 0·log 0 is 0, even where both are 0
            sums.append(torch.where(p == 0, 0.0, p * (x - y)).sum(-1, dtype=torch.float64))
            equal += int((x.argmax(-1) == y.argmax(-1)).sum())
        divergence += torch.cat(sums).sum().item()
        positions += len(batches[0])
    if not math.isfinite(divergence):
        raise UserError(
            "models/merged: the trained or the merged model gives NaN or infinity for held-out "
            "conversations; nothing was written. Train at a lower train.learning_rate, or set "
            "merge.dtype to bf16 or fp32."
        )
    # Rounding can make a sum of zeros negative.
    return Agreement(max(0.0, divergence / positions), equal / positions, positions)


def mean(parts: Sequence[Agreement]) -> Agreement:
    """Agreement over the positions of all parts."""
    positions = sum(part.positions for part in parts)
    sums = ((p.kl_divergence * p.positions, p.top1_agreement * p.positions) for p in parts)
    kl_divergence, top1_agreement = (sum(each) / positions for each in zip(*sums, strict=True))
    return Agreement(kl_divergence, top1_agreement, positions)
