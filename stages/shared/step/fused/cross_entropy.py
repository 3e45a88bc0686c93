"""Cross entropy of the supervised tokens with the head's matmul, chunk by chunk.

    z = h·Wᵀ,  loss = ln Σ exp(z) − z[target],  ∂h = (softmax(z) − onehot(target))·W

Logits are the largest tensor of a step. A chunk's gradient is computed as soon as its losses are;
what is saved for the backward pass is the gradient of the hidden states.

Source: Hsu et al. 2024, Liger Kernel, arXiv:2410.10989, section 3.2.
"""

from collections.abc import Callable
from typing import Any

import torch

from stages.shared.step.fused import gpu

# Of a chunk's logits in the compute dtype: 340 tokens of 49,152 logits are a large enough matmul
# for a CPU. There, as many are in fp32 at once as stay in its cache from pass to pass.
LOGITS_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
FP32_LOGITS_BYTES = 4 * 2**20


def linear_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Negative log-likelihood of each target, in nats, fp32 [tokens].

    Args:
        hidden: [tokens, width], in the compute dtype.
        head: [vocabulary, width], frozen.
        targets: int64 [tokens].
    """
    return _LinearCrossEntropy.apply(hidden, head, targets)


def chunk_tokens(vocabulary: int, tokens: int, itemsize: int, device_type: str) -> int:
    """Tokens of a chunk, of at most `tokens`; `itemsize` of the compute dtype."""
    return min(tokens, max(1, LOGITS_BYTES[device_type] // (itemsize * vocabulary)))


def fp32_chunk_tokens(vocabulary: int, tokens: int) -> int:
    """Tokens of a chunk's parts, whose logits a CPU casts to fp32."""
    return min(tokens, max(1, FP32_LOGITS_BYTES // (4 * vocabulary)))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        weight = head.to(hidden.dtype)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden)
        size = chunk_tokens(len(head), len(hidden), hidden.dtype.itemsize, hidden.device.type)
        # One buffer for all chunks: fresh pages of this size are cleared by the system each time.
        buffer = hidden.new_empty(size, len(head))
        on_gpu = gpu.on_gpu(hidden.device)
        cross_entropy = gpu.kernels().cross_entropy if on_gpu else _cross_entropy_by_parts(buffer)
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            logits = torch.mm(hidden[chunk], weight.t(), out=buffer[: len(hidden[chunk])])
            cross_entropy(logits, targets[chunk], losses[chunk])
            torch.mm(logits, weight, out=dhidden[chunk])
        ctx.save_for_backward(dhidden)
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        # In fp32: rounded to half precision, the factor would be off by the same for all tokens.
        return (dhidden * dlosses[:, None]).to(dhidden.dtype), None, None


def _cross_entropy_by_parts(
    buffer: torch.Tensor,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """A CPU's counterpart of the kernel, for chunks as large as `buffer` [tokens, vocabulary]."""
    size = fp32_chunk_tokens(buffer.shape[1], len(buffer))
    fp32_buffer = buffer.new_empty(size, buffer.shape[1], dtype=torch.float32)

    def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
        parts = zip(*(x.split(size) for x in (logits, targets, losses)), strict=True)
        for some, some_targets, some_losses in parts:
            fp32 = fp32_buffer[: len(some)]
            some_losses.copy_(_cross_entropy(some, some_targets[:, None], fp32))

    return cross_entropy


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, buffer: torch.Tensor
) -> torch.Tensor:
    """Losses, fp32 [tokens], of logits [tokens, vocabulary], which become their gradients.

    Args:
        logits: z, in the compute dtype.
        targets: int64 [tokens, 1].
        buffer: overwritten, in the shape of logits, fp32.
    """
    buffer.copy_(logits)
    targeted, largest = buffer.gather(1, targets), buffer.amax(1, keepdim=True)
    probabilities = torch.softmax(buffer, dim=-1, out=buffer)
    # The largest probability is never too small for a logarithm, as that of a target may be.
    log_sum = largest - probabilities.amax(1, keepdim=True).log()
    probabilities.scatter_add_(1, targets, torch.full_like(targeted, -1.0))
    logits.copy_(probabilities)
    return (log_sum - targeted).squeeze(1)
