"""The loss in chunks is torch's, and finite where a probability is not.

On a GPU, with its kernel, where one is asked for: TEST_GPU=1 pytest.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

from stages.shared.step.fused import cross_entropy as fused_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_loss_in_chunks_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, device=DEVICE, requires_grad=True)
    head, targets = torch.randn(50, 16, device=DEVICE), torch.randint(0, 50, (23,), device=DEVICE)
    weights = torch.rand(23, device=DEVICE)
    expected = cross_entropy(hidden @ head.t(), targets, reduction="none")
    (wanted,) = torch.autograd.grad(expected @ weights, hidden)
    monkeypatch.setitem(fused_loss.LOGITS_BYTES, DEVICE.type, 4 * 50 * 5)  # five tokens at a time
    monkeypatch.setattr(fused_loss, "FP32_LOGITS_BYTES", 4 * 50 * 2)
    losses = fused_loss.linear_cross_entropy(hidden, head, targets)
    (found,) = torch.autograd.grad(losses @ weights, hidden)
    assert torch.allclose(losses, expected, atol=1e-5)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_token_of_no_probability_has_a_finite_loss_and_gradient() -> None:
    hidden = torch.tensor([[200.0, 0.0]], device=DEVICE, requires_grad=True)
    losses = fused_loss.linear_cross_entropy(
        hidden, torch.eye(2, device=DEVICE), torch.tensor([1], device=DEVICE)
    )
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert losses.tolist() == [200.0]
    assert gradient.tolist() == [[1.0, -1.0]]
