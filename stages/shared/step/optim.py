"""The optimizer and its schedule, and how their states come back as what they were."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from stages.shared.bnb import AdamW8bit, Optimizer8bit
from stages.shared.step.config import Train
from stages.shared.step.paged import PagedAdamW8bit, PagedAdamW32bit

# By parameter and kind of device. Paged: the same arithmetic, and states that may leave a full GPU.
# On a CPU torch's one kernel, four times as fast as a call for each operation on each tensor.
OPTIMIZERS: dict[tuple[str, str], Callable[..., Optimizer]] = {
    ("adamw", "cpu"): partial(AdamW, fused=True),
    ("adamw", "cuda"): PagedAdamW32bit,
    ("adamw_8bit", "cpu"): AdamW8bit,
    ("adamw_8bit", "cuda"): PagedAdamW8bit,
}
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2.1}  # a trainable parameter; small tensors stay in fp32


def make_optimizer(model: nn.Module, train: Train, device: torch.device) -> Optimizer:
    """AdamW over what learns; weight decay on matrices alone, not on biases, norms and scales."""
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind: Any = OPTIMIZERS[train.optimizer, device.type]
    return kind([group for group in groups if group["params"]], lr=train.learning_rate)


def make_scheduler(optimizer: Optimizer, train: Train, steps: int) -> LRScheduler:
    """Linear warm-up over a fraction of the steps, then the schedule.

    Rounded up, but never all of the steps: a training of one would learn nothing, at a rate of 0.
    """
    name = "constant_with_warmup" if train.scheduler == "constant" else train.scheduler
    warmup = min(math.ceil(steps * train.warmup), steps - 1)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer.state_dict()` gave: 8-bit states stay 8-bit, paged ones paged.

    `load_state_dict` of bitsandbytes moves a paged state to the device for good, and a training
    that fitted no longer does after it resumes; here such a state gets pages of its own again.
    """
    if not isinstance(optimizer, Optimizer8bit):
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
