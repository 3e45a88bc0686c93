"""Scorer: negative log-likelihoods of supervised tokens of held-out conversations.

Training, `evaluate` and merge verification call it with the same batching, so their numbers agree.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
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


@torch.inference_mode()
def computed(
    compute: Callable[[nn.Module, Packed], torch.Tensor],
    model: nn.Module,
    examples: Sequence[Example],
    device: torch.device,
    dtype: torch.dtype,
    desc: str,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Packed, torch.Tensor]]:
    """The scorer's micro-batches, and what `compute` gives for each.

    Of a `share` (rank, size) those of one process; all make as many forward passes.
    """
    (rank, size), packs = share, packing.may_pack(model.config)
    every = packing.bins(examples, SCORING_TOKENS)
    own = packing.even_passes([every[r::size] for r in range(size)], packs)[rank]
    with display.bar(total=sum(map(len, own)), desc=desc, unit="row") as bar:
        for micro_batch in own:
            batch = packing.pack(micro_batch, device)
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
        for batch, of_tokens in computed(negative_log_likelihoods, *inputs):
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
