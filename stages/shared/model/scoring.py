"""Scorer: negative log-likelihoods of supervised tokens of held-out conversations.

Training, `evaluate` and merge verification call it with the same batching, so their numbers agree.
"""

from collections.abc import Callable, Iterator, Sequence
from inspect import signature
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


def supervised_logits(model: Any, batch: Packed) -> torch.Tensor:
    """Logits that predict the supervised tokens: compute dtype [supervised, vocabulary].

    The head sees no other position: logits are the largest tensor of a step.
    """
    options: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if packing.may_pack(model.config):
        options |= {"position_ids": batch.position_ids, "conversation_lengths": batch.lengths}
    if "logits_to_keep" not in signature(without_adapter(model).forward).parameters:
        return model(**options).logits[0, batch.predictors]
    return model(**options, logits_to_keep=batch.predictors).logits[0]


def negative_log_likelihoods(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Negative log-likelihood of each supervised token in nats: fp32 [supervised]."""
    logits = supervised_logits(model, batch).float()
    return cross_entropy(logits, batch.targets, reduction="none")


@torch.inference_mode()
def forward_batches(
    compute: Callable[[nn.Module, Packed], torch.Tensor],
    model: nn.Module,
    examples: Sequence[Example],
    device: torch.device,
    dtype: torch.dtype,
    desc: str,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Packed, torch.Tensor]]:
    """Packed rows of the scorer's micro-batches, each with the result of `compute`.

    Of a `share` (rank, size) those of one process; all make as many forward passes.
    """
    (rank, size), packs = share, packing.may_pack(model.config)
    every = packing.bins(examples, SCORING_TOKENS)
    own = packing.even_passes([every[r::size] for r in range(size)], packs)[rank]
    with display.bar(total=sum(map(len, own)), desc=desc, unit="row") as bar:
        for micro_batch in own:
            for batch in packing.packed_rows(model.config, micro_batch, device):
                if not len(batch.predictors):  # idle, as are all that follow
                    experts.stop_counting(model)
                with autocast(device, dtype):
                    result = compute(model, batch)
                yield batch, result
            bar.update(len(micro_batch))


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
        inputs = (model, examples, device, dtype, desc, share)
        for batch, of_tokens in forward_batches(negative_log_likelihoods, *inputs):
            losses, rows = of_tokens.cpu().numpy(), batch.rows.numpy()
            np.add.at(sums, rows, losses.astype(np.float64))
            if by_token is not None:
                by_token |= {row: losses[rows == row] for row in np.unique(rows)}
    finally:
        model.train(was_training)
    return sums, np.array([e.supervised_tokens for e in examples])


def mean_loss(sums: np.ndarray, tokens: np.ndarray) -> float:
    """Mean over supervised tokens, in nats."""
    return float(sums.sum() / tokens.sum())
