"""Gradient of one optimizer step, however its conversations are divided into micro-batches."""

from collections.abc import Callable, Container, Sequence

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from stages.shared.model import packing, scoring
from stages.shared.model.packing import Example, Packed
from stages.shared.step.fused import patch
from stages.shared.step.fused.lora import dequantization_buffer
from stages.shared.step.router_loss import RouterLoss
from stages.shared.weights.precision import autocast

AllReduce = Callable[[Sequence[torch.Tensor]], None]  # sums each over all processes, in place


def accumulate(
    model: nn.Module,
    micro_batches: Sequence[Sequence[Example]],
    loss_weight: float,
    *,
    dtype: torch.dtype,
    fused: bool,
    scaler: torch.amp.GradScaler,
    all_reduce: AllReduce | None = None,
    router: RouterLoss | None = None,
    scattered: Container[nn.Parameter] = (),
) -> torch.Tensor:
    """Add the gradient of a step's mean loss to the parameters' `grad`; return the loss.

    The loss is the sum of -w log p over all supervised tokens of the step, divided by the sum of
    their weights w, which are 1 unless the data says otherwise: a conversation counts by its
    supervised tokens, whichever micro-batch or process it falls to. It is returned in nats, fp64
    [1], without the router's.

    Args:
        model: in training mode.
        micro_batches: of this process, as many as of the others (`packing.even_passes`).
        loss_weight: sum of w over the whole step and all processes.
        dtype: of the matmuls.
        fused: the model was patched by `patch.fuse`.
        scaler: enabled for fp16 on a GPU.
        all_reduce: sums gradient and loss over the processes.
        router: adds the load-balancing loss of a mixture to the gradient.
        scattered: parameters whose gradients are summed elsewhere (`shards.Shards`).
    """
    device = next(model.parameters()).device
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    if router is not None:
        router.total.zero_()

    def backward(row: Packed) -> torch.Tensor:
        """Gradient of a row; no graph outlives the call, as int8 layers save all their inputs."""
        if router is not None:
            router.watch(row)
        with autocast(device, dtype):
            losses = (patch if fused else scoring).negative_log_likelihoods(model, row)
        loss = (losses * row.weights).sum() / loss_weight
        scaler.scale(loss + router.loss(row, loss_weight) if router else loss).backward()
        return loss.detach()

    with dequantization_buffer():
        for micro_batch in micro_batches:
            for row in packing.packed_rows(model.config, micro_batch, device):
                loss += backward(row)
    gradients = []
    for p in model.parameters():
        if p.requires_grad and p not in scattered:
            if p.grad is None:  # an expert without tokens; AdamW would leave it out
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
    if all_reduce is not None:
        all_reduce([loss, *([router.total] if router else []), *gradients])
    return loss


def clip(
    whole: Sequence[nn.Parameter],
    parts: Sequence[nn.Parameter],
    max_norm: float,
    all_reduce: AllReduce,
) -> float:
    """Clip gradients by their total norm, which is returned; each process has own `parts`."""
    norm = get_total_norm([p.grad for p in whole if p.grad is not None])
    if parts:
        squares = get_total_norm([p.grad for p in parts if p.grad is not None]).square()
        all_reduce([squares])
        norm = (norm.to(squares.device).square() + squares).sqrt()
    clip_grads_with_norm_([*whole, *parts], max_norm, norm)
    return norm.item()
