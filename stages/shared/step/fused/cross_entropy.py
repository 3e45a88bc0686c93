"""The loss of supervised tokens without their logits: they are made and let go of in chunks.

Logits are the largest tensor of a step. Each chunk's gradient is computed as soon as its loss is,
and what stays is the gradient of the hidden states.

    loss = ln Σ exp(z) − z[target],  ∂h = (softmax(z) − onehot(target))·W,  z = h·Wᵀ

Source: Hsu et al. 2024, Liger Kernel, arXiv:2410.10989, section 3.2, for the chunks.
"""

from collections.abc import Callable
from typing import Any

import torch

from stages.shared.step.fused import gpu
from stages.shared.workspace import logits_at_once, wide_logits_at_once

# Of logits, targets and room for losses: the logits become their gradients.
IntoGradients = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def token_losses(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each target, in nats.

    Args:
        hidden: [tokens, width], in the dtype that products run in.
        head: [vocabulary, width], frozen.
        targets: int64 [tokens].

    Returns:
        fp32 [tokens].
    """
    return _TokenLosses.apply(hidden, head, targets)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        matrix = head.to(hidden.dtype)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradients = torch.empty_like(hidden)
        size = logits_at_once(len(head), len(hidden), hidden.dtype.itemsize, hidden.device.type)
        # Room for every chunk: so large a tensor's pages come from the system, and are cleared.
        room = hidden.new_empty(size, len(head))
        into_gradients = (
            gpu.kernels().cross_entropy if gpu.on_gpu(hidden.device) else _in_parts(room)
        )
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = torch.mm(hidden[part], matrix.t(), out=room[: len(hidden[part])])
            into_gradients(logits, targets[part], losses[part])
            torch.mm(logits, matrix, out=gradients[part])
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        # The factor is not rounded: in half precision it would be off by the same for all tokens.
        return (gradients * gradient[:, None]).to(gradients.dtype), None, None


def _in_parts(room: torch.Tensor) -> IntoGradients:
    """A few tokens at a time: in fp32 their logits stay in a CPU's cache from pass to pass."""
    few = wide_logits_at_once(room.shape[1], len(room))
    wide = room.new_empty(few, room.shape[1], dtype=torch.float32)

    def into_gradients(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
        rows = zip(*(x.split(few) for x in (logits, targets, losses)), strict=True)
        for some, wanted, found in rows:
            found.copy_(_into_gradient(some, wanted[:, None], wide[: len(some)]))

    return into_gradients


def _into_gradient(logits: torch.Tensor, wanted: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """The losses [tokens], fp32, of logits [tokens, vocabulary], which become their gradient.

    Args:
        logits: z, in the dtype that products run in.
        wanted: int64 [tokens, 1], the targets.
        wide: room for z in fp32.
    """
    wide.copy_(logits)
    targeted, largest = wide.gather(1, wanted), wide.amax(1, keepdim=True)
    probabilities = torch.softmax(wide, dim=-1, out=wide)
    # The largest probability is never too small to have a logarithm, as that of a target may be.
    total = largest - probabilities.amax(1, keepdim=True).log()
    probabilities.scatter_add_(1, wanted, torch.full_like(targeted, -1.0))
    logits.copy_(probabilities)
    return (total - targeted).squeeze(1)
