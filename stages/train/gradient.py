"""The gradient of one optimizer step, which does not depend on how the step was divided."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from stages.shared import packing, scoring
from stages.shared.examples import Example
from stages.shared.packing import Packed
from stages.shared.precision import autocast
from stages.shared.transfer import to_device
from stages.train.computing import Computing
from stages.train.fused import kept
from stages.train.fused import model as fused
from stages.train.helpers import Helpers
from stages.train.processes import Processes


@dataclass(frozen=True)
class StepSize:
    """What was computed on for a step, over all processes.

    Attributes:
        tokens: of the conversations.
        input_tokens: of them, those that something learnt can see.
        supervised_tokens: those that are learnt.
        computed_tokens: positions that went through the model, padding included if there were any.
        capacity_tokens: what its micro-batches could have held.
    """

    tokens: int = 0
    input_tokens: int = 0
    supervised_tokens: int = 0
    computed_tokens: int = 0
    capacity_tokens: int = 0

    def __add__(self, other: "StepSize") -> "StepSize":
        return StepSize(
            self.tokens + other.tokens,
            self.input_tokens + other.input_tokens,
            self.supervised_tokens + other.supervised_tokens,
            self.computed_tokens + other.computed_tokens,
            self.capacity_tokens + other.capacity_tokens,
        )


def accumulate(
    model: nn.Module,
    examples: Sequence[Example],
    computing: Computing,
    processes: Processes,
    scaler: torch.amp.GradScaler,
    helpers: Helpers | None = None,
) -> tuple[float, StepSize]:
    """Add the gradient of a step's mean loss to the parameters' `grad`.

    The loss is the sum of -log p over the supervised tokens of the step's conversations, divided by
    their number: a conversation weighs what it has to teach, whichever micro-batch or process it
    fell to. Every process ends with the whole step's gradient and loss.

    Args:
        model: in training mode; parameters that are not to learn need no gradient.
        examples: the conversations of the step.
        computing: the most tokens of a micro-batch, and what products run in.
        processes: among which the micro-batches are divided.
        scaler: of the loss, for fp16 on a GPU; disabled anywhere else.
        helpers: of a process that trains alone, that compute a part.

    Returns:
        The loss in nats a supervised token, and what was computed on.
    """
    inputs = packing.input_tokens(examples)
    supervised = sum(example.supervised_tokens for example in examples)
    limit = computing.micro_batch_tokens
    if processes.size > 1:  # a step that would fit into one micro-batch occupies every process
        limit = min(limit, -(-inputs // processes.size))
        own, others = packing.split(examples, limit)[processes.share], []
    else:
        own, *others = packing.divide(examples, limit, helpers.workers if helpers else 1)
    summed = torch.zeros(3, dtype=torch.float64, device=computing.device)
    parts = [(part, limit, supervised) for part in others]
    with helpers.beside(parts, summed) if helpers else nullcontext():
        summed += backward(model, own, limit, supervised, computing, scaler)
    processes.add_up([summed])
    _share_gradients(model, processes)
    mean, *counted = summed.tolist()
    tokens = sum(map(len, examples))
    return mean, StepSize(tokens, inputs, supervised, *map(int, counted))


def backward(
    model: nn.Module,
    micro_batches: Sequence[Sequence[Example]],
    limit: int,
    supervised: int,
    computing: Computing,
    scaler: torch.amp.GradScaler,
) -> torch.Tensor:
    """Add the gradients of some of a step's micro-batches to the parameters' `grad`.

    Args:
        model: as for `accumulate`.
        micro_batches: the conversations of each.
        limit: the most tokens that one of them could have had.
        supervised: tokens of the whole step.
        computing: what products run in.
        scaler: of the loss.

    Returns:
        fp64 [3]: their part of the loss; `computed_tokens` and `capacity_tokens` of `StepSize`.
    """
    loss = torch.zeros(1, dtype=torch.float64, device=computing.device)
    computed = capacity = 0  # counted here: a device would have to be waited for
    with kept.for_a_step():
        for micro_batch in micro_batches:
            batch = packing.pack(micro_batch, computing.device)
            loss += _backward(model, batch, supervised, computing, scaler)
            computed += batch.input_ids.numel()
            capacity += max(limit, batch.input_ids.numel())
    sizes = to_device(np.array([computed, capacity], dtype=np.float64), computing.device)
    return torch.cat([loss, sizes])


def _backward(
    model: nn.Module,
    batch: Packed,
    supervised: int,
    computing: Computing,
    scaler: torch.amp.GradScaler,
) -> torch.Tensor:
    """Add a micro-batch's gradient; returns its part of the loss, fp32 [].

    A function of its own, so that nothing of its graph outlives it: an int8 layer's inputs would
    stand beside those of the next micro-batch.
    """
    likelihoods = fused if computing.fused else scoring
    with autocast(computing.device, computing.dtype):
        losses = likelihoods.negative_log_likelihoods(model, batch)
    loss = losses.sum() / supervised
    scaler.scale(loss).backward()
    return loss.detach()


def _share_gradients(model: nn.Module, processes: Processes) -> None:
    if processes.size == 1:
        return
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        if parameter.grad is None:  # a short step may have left this process without work
            parameter.grad = torch.zeros_like(parameter)
    processes.add_up([p.grad for p in learning if p.grad is not None])
