"""The proof of a merge: two models, the same held-out conversations, position by position."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.shared import scoring
from stages.shared.core.errors import UserError
from stages.shared.examples import Example
from stages.shared.precision import autocast

POSITIONS = 4096  # enough to tell an agreement of 0.99 from 0.98; bounds time and memory
MIN_TOP1_AGREEMENT = 0.99
MAX_KL_DIVERGENCE = 1e-3  # nats a token


@dataclass(frozen=True)
class Agreement:
    """How far two models agree: mean KL(first ‖ second) in nats a token, and equal top-1 tokens."""

    kl_divergence: float
    top1_agreement: float
    positions: int


def first_positions(examples: Sequence[Example]) -> list[Example]:
    """The conversations that the proof looks at: the first, up to `POSITIONS` supervised tokens."""
    chosen: list[Example] = []
    total = 0
    for example in examples:
        total += example.supervised_tokens
        if chosen and total > POSITIONS:
            break
        chosen.append(example)
    return chosen


@torch.inference_mode()
def log_probabilities(
    model: nn.Module | PreTrainedModel,
    examples: Sequence[Example],
    device: torch.device,
    dtype: torch.dtype,
    desc: str,
) -> list[torch.Tensor]:
    """The distribution at each supervised position, a tensor a batch: fp32 [supervised, vocab]."""
    result = []
    for batch in scoring.batches(examples, device, desc):
        with autocast(device, dtype):
            logits = scoring.supervised_logits(model, batch)
        result.append(logits.float().log_softmax(-1).cpu())
    return result


def compare(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> Agreement:
    """Compare two models' log-probabilities, batch by batch.

    Raises:
        UserError: one of them gives no numbers.
    """
    divergence, equal, positions = 0.0, 0, 0
    for one, other in zip(first, second, strict=True):
        there = one.exp()  # a token that cannot be adds nothing, where the other may say so too
        apart = torch.where(there == 0, 0.0, there * (one - other))
        divergence += apart.sum(-1, dtype=torch.float64).sum().item()
        equal += int((one.argmax(-1) == other.argmax(-1)).sum())
        positions += len(one)
    if not math.isfinite(divergence):
        raise UserError(
            "models/merged: what was trained, or what it was merged to, gives no numbers (NaN or "
            "infinity) for held-out conversations; nothing was written; train at a lower "
            "train.learning_rate, or set merge.dtype to bf16 or fp32"
        )
    # Rounding can leave a sum of zeros a hair below zero.
    return Agreement(max(0.0, divergence / positions), equal / positions, positions)


def require(agreement: Agreement, dtype: str) -> None:
    """The gate: a merge that is not what was trained is not written.

    One token may differ however few there are: two that are equally likely change places.

    Args:
        agreement: of what was trained and what was merged.
        dtype: of the merged weights, as `merge.dtype` names it.

    Raises:
        UserError: the agreement is below `MIN_TOP1_AGREEMENT`, or the divergence is not below
            `MAX_KL_DIVERGENCE`.
    """
    differ = round((1 - agreement.top1_agreement) * agreement.positions)
    allowed = max(1, int((1 - MIN_TOP1_AGREEMENT) * agreement.positions))
    if differ <= allowed and agreement.kl_divergence <= MAX_KL_DIVERGENCE:
        return
    advice = {
        "bf16": "set merge.dtype to fp16 or fp32, which round less",
        "fp16": "set merge.dtype to fp32, which rounds nothing",
        "fp32": "fp32 rounds nothing: this is a fault of ours; please report it with params.yaml",
    }
    raise UserError(
        f"models/merged: over {agreement.positions} held-out positions the merged model agrees "
        f"with the adapter in {agreement.top1_agreement:.4f} of its most likely tokens, at "
        f"{agreement.kl_divergence:.2e} nats a token; expected at least {MIN_TOP1_AGREEMENT} and "
        f"at most {MAX_KL_DIVERGENCE}; nothing was written; {advice[dtype]}"
    )
