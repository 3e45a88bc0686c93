"""The head's matmul with cross entropy in chunks, against torch."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from stages.shared.step.fused import cross_entropy as fused
from stages.shared.step.fused.cross_entropy import linear_cross_entropy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_linear_cross_entropy_equals_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, device=DEVICE, requires_grad=True)
    head, targets = torch.randn(50, 16, device=DEVICE), torch.randint(0, 50, (23,), device=DEVICE)
    weights = torch.rand(23, device=DEVICE)
    expected = cross_entropy(hidden @ head.t(), targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected @ weights, hidden)
    monkeypatch.setitem(fused.LOGITS_BYTES, DEVICE.type, 4 * 50 * 5)  # five tokens a chunk
    monkeypatch.setattr(fused, "FP32_LOGITS_BYTES", 4 * 50 * 2)
    losses = linear_cross_entropy(hidden, head, targets)
    (gradient,) = torch.autograd.grad(losses @ weights, hidden)
    assert torch.allclose(losses, expected, atol=1e-5)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)


def test_cross_entropy_is_finite_without_probability() -> None:
    hidden = torch.tensor([[200.0, 0.0]], device=DEVICE, requires_grad=True)
    target = torch.tensor([1], device=DEVICE)
    losses = linear_cross_entropy(hidden, torch.eye(2, device=DEVICE), target)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert losses.tolist() == [200.0]
    assert gradient.tolist() == [[1.0, -1.0]]
