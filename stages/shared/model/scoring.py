"""Scorer: negative log-likelihoods of supervised tokens of held-out conversations.

Training, `evaluate` and merge verification call it with the same batching, so their numbers agree.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from stages.shared.core import display
from stages.shared.model import packing
from stages.shared.model.loading import without_adapter
from stages.shared.model.packing import Example, Packed
from stages.shared.weights import experts
from stages.shared.weights.precision import autocast

# Fixed: in bf16 other batches score differently (3.27070 and 3.27108 nats). Small: without our
# attention, packed conversations are computed against each other.
SCORING_TOKENS = 1024


def supervised_logits(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Logits that predict the supervised tokens: compute dtype [supervised, vocabulary].

    The head sees no other position: logits are the largest tensor of a step.
    """
    if not packing.may_pack(model.config):
        return torch.cat([_unpacked_logits(model, one) for one in packing.unpack(batch)])
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        logits_to_keep=batch.predictors,
        use_cache=False,
        conversation_lengths=batch.lengths,
    )
    return output.logits[0]


def _unpacked_logits(model: Any, batch: Packed) -> torch.Tensor:
    """Logits of one conversation, by arguments that every causal model takes."""
    if "logits_to_keep" not in inspect.signature(without_adapter(model).forward).parameters:
        return model(input_ids=batch.input_ids, use_cache=False).logits[0, batch.predictors]
    keep = {"logits_to_keep": batch.predictors, "use_cache": False}
    return model(input_ids=batch.input_ids, **keep).logits[0]


def negative_log_likelihoods(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Negative log-likelihood of each supervised token in nats: fp32 [supervised]."""
    logits = supervised_logits(model, batch).float()
    return cross_entropy(logits, batch.targets, reduction="none")


def batches(
    examples: Sequence[Example],
    device: torch.device,
    desc: str,
    share: tuple[int, int] = (0, 1),
    packs: bool = True,
) -> Iterator[Packed]:
    """The scorer's micro-batches, with a progress bar; of a `share` (rank, size), one process's.

    All processes get as many forward passes; `packs` as in `packing.even_passes`.
    """
    rank, size = share
    every = packing.bins(examples, SCORING_TOKENS)
    micro_batches = packing.even_passes([every[r::size] for r in range(size)], packs)[rank]
    with display.bar(total=sum(map(len, micro_batches)), desc=desc, unit="row") as bar:
        for micro_batch in micro_batches:
            yield packing.pack(micro_batch, device)
            bar.update(len(micro_batch))


@torch.inference_mode()
def score(
    model: nn.Module,
    examples: Sequence[Example],
    device: torch.device,
    dtype: torch.dtype,
    desc: str,
    share: tuple[int, int] = (0, 1),
    by_token: dict[int, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum each conversation's negative log-likelihood, in nats: fp64 [rows]; and count its tokens.

    `row` numbers the examples from 0. Processes that score a `share` (rank, size) of the
    micro-batches each add up their sums. `by_token` takes each row's, fp32 [supervised]. Weights
    act on training alone: here each supervised token counts once.
    """
    sums = np.zeros(len(examples))
    was_training = model.training
    model.eval()
    try:
        for batch in batches(examples, device, desc, share, packing.may_pack(model.config)):
            if not len(batch.predictors):  # idle, as are all that follow
                experts.stop_counting(model)
            with autocast(device, dtype):
                losses = negative_log_likelihoods(model, batch)
            np.add.at(sums, batch.rows.cpu().numpy(), losses.double().cpu().numpy())
            if by_token is not None:
                rows = batch.rows.cpu().numpy()
                by_token |= {row: losses.cpu().numpy()[rows == row] for row in np.unique(rows)}
    finally:
        model.train(was_training)
    return sums, np.array([e.supervised_tokens for e in examples])


def mean_loss(sums: np.ndarray, tokens: np.ndarray) -> float:
    """Mean over supervised tokens, in nats."""
    return float(sums.sum() / tokens.sum())
