"""Cross entropy of the supervised tokens with the head's matmul, chunk by chunk.

    z = h·Wᵀ,  loss = ln Σ exp(z) − z[target],  ∂h = (softmax(z) − onehot(target))·W

Logits are the largest tensor of a step. A chunk's gradient is computed as soon as its losses are;
the gradient of the hidden states is saved for the backward pass.

Source: Hsu et al. 2024, Liger Kernel, arXiv:2410.10989, section 3.2.
"""

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
    """Negative log-likelihood of each target (int64 [tokens]), in nats, fp32 [tokens].

    `hidden` is [tokens, width], in the compute dtype; `head` [vocabulary, width], frozen.
    """
    if not len(hidden):  # no kernel is launched on nothing
        return hidden.float().sum(1)
    return _LinearCrossEntropy.apply(hidden, head, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        weight = head.to(hidden.dtype)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden)
        row_bytes = len(head) * hidden.dtype.itemsize
        size = min(len(hidden), max(1, LOGITS_BYTES[hidden.device.type] // row_bytes))
        # One buffer for all chunks: fresh pages of this size are cleared by the system each time.
        buffer = hidden.new_empty(size, len(head))
        kernel = gpu.kernels().cross_entropy if gpu.on_gpu(hidden.device) else _cross_entropy
        chunks = zip(*(x.split(size) for x in (hidden, targets, losses, dhidden)), strict=True)
        for some_hidden, some_targets, some_losses, some_dhidden in chunks:
            logits = torch.mm(some_hidden, weight.t(), out=buffer[: len(some_hidden)])
            kernel(logits, some_targets, some_losses)
            torch.mm(logits, weight, out=some_dhidden)
        ctx.save_for_backward(dhidden)
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        # In fp32: rounded to half precision, the factor would be off by the same for all tokens.
        return (dhidden * dlosses[:, None]).to(dhidden.dtype), None, None


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
    """A CPU's counterpart of `triton_kernels.cross_entropy`: logits become their gradients."""
    size = min(len(logits), max(1, FP32_LOGITS_BYTES // (4 * logits.shape[1])))
    buffer = logits.new_empty(size, logits.shape[1], dtype=torch.float32)
    parts = zip(*(x.split(size) for x in (logits, targets[:, None], losses)), strict=True)
    for some_logits, some_targets, some_losses in parts:
        z = buffer[: len(some_logits)].copy_(some_logits)
        targeted, largest = z.gather(1, some_targets), z.amax(1, keepdim=True)
        probabilities = torch.softmax(z, dim=-1, out=z)
        # The largest probability is never too small for a logarithm, as that of a target may be.
        log_sum = largest - probabilities.amax(1, keepdim=True).log()
        probabilities.scatter_add_(1, some_targets, torch.full_like(targeted, -1.0))
        some_logits.copy_(probabilities)
        some_losses.copy_((log_sum - targeted).squeeze(1))
