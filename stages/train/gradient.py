"""The gradient of one optimizer step, divided among processes and helpers."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from stages.shared import packing
from stages.shared.examples import Example
from stages.shared.step import gradient
from stages.train.computing import Computing
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
        micro_batches = packing.split(examples, limit)
        own, others = micro_batches[processes.share], []
    else:
        own, *others = packing.divide(examples, limit, helpers.workers if helpers else 1)
        micro_batches = [one for part in (own, *others) for one in part]
    loss = torch.zeros(1, dtype=torch.float64, device=computing.device)
    with (
        helpers.beside([(part, supervised) for part in others], loss) if helpers else nullcontext()
    ):
        loss += gradient.accumulate(
            model,
            own,
            supervised,
            dtype=computing.dtype,
            fused=computing.fused,
            scaler=scaler,
            all_reduce=processes.add_up if processes.size > 1 else None,
        )
    computed = [packing.input_tokens(one) for one in micro_batches]
    capacity = sum(max(limit, tokens) for tokens in computed)
    tokens = sum(map(len, examples))
    return loss.item(), StepSize(tokens, inputs, supervised, sum(computed), capacity)
