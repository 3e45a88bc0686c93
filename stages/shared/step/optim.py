"""AdamW in fp32 or 8 bits, paged on a GPU; its schedule, and how its states are restored."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from stages.shared.step.config import Train
from stages.shared.weights import bnb

# By `train.optimizer` and device type. Paged: the same arithmetic, and states may leave a full GPU.
# On a CPU torch's one kernel, four times as fast as a call for each operation on each tensor.
OPTIMIZERS: dict[tuple[str, str], Callable[..., Optimizer]] = {
    ("adamw", "cpu"): partial(AdamW, fused=True),
    ("adamw", "cuda"): bnb.PagedAdamW32bit,
    ("adamw_8bit", "cpu"): bnb.AdamW8bit,
    ("adamw_8bit", "cuda"): bnb.PagedAdamW8bit,
}
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2.1}  # a trainable parameter; small tensors stay in fp32


def make_optimizer(
    parameters: Iterable[nn.Parameter], train: Train, device: torch.device
) -> Optimizer:
    """AdamW over trainable parameters; weight decay on matrices alone, not on biases and norms."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    make = OPTIMIZERS[train.optimizer, device.type]
    return make([group for group in groups if group["params"]], lr=train.learning_rate)


def make_scheduler(optimizer: Optimizer, train: Train, steps: int) -> LRScheduler:
    """Linear warm-up over a fraction of the steps, then the schedule.

    Never over all steps: a training of one step would have a rate of 0.
    """
    name = "constant_with_warmup" if train.scheduler == "constant" else train.scheduler
    warmup = min(math.ceil(steps * train.warmup), steps - 1)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load `optimizer.state_dict()`; 8-bit states stay 8-bit, paged ones paged.

    bitsandbytes moves a paged state to the device for good: a training that fitted would not,
    resumed.
    """
    if not isinstance(optimizer, bnb.Optimizer8bit):
        optimizer.load_state_dict(state)
        return
    optimizer.load_state_dict(state, move_to_device=False)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if name in ("state1", "state2"):
                values[name] = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                values[name].copy_(value)
            elif isinstance(value, torch.Tensor):
                values[name] = value.to(parameter.device)
