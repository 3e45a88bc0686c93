"""The loss of supervised tokens without their logits: they are made and let go of in chunks.

Logits are the largest tensor of a step. Each chunk's gradient is computed as soon as its loss is,
and what stays is the gradient of the hidden states.

    loss = ln Σ exp(z) − z[target],  ∂h = (softmax(z) − onehot(target))·W,  z = h·Wᵀ

Source: Hsu et al. 2024, Liger Kernel, arXiv:2410.10989, section 3.2, for the chunks.
"""

from typing import Any

import torch

from stages.shared.workspace import LOSS_CHUNK_BYTES


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
        size = max(1, LOSS_CHUNK_BYTES // (4 * len(head)))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            wanted = targets[part, None]
            logits = (hidden[part] @ matrix.t()).float()
            likelihoods = torch.log_softmax(logits, dim=-1)
            del logits
            losses[part] = likelihoods.gather(1, wanted).neg_().squeeze(1)
            probabilities = likelihoods.exp_()
            probabilities.scatter_add_(
                1, wanted, torch.full_like(wanted, -1.0, dtype=torch.float32)
            )
            gradients[part] = probabilities.to(hidden.dtype) @ matrix
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        # The factor is not rounded: in half precision it would be off by the same for all tokens.
        return (gradients * gradient[:, None]).to(gradients.dtype), None, None
