"""Attention as batched products, against torch's own in fp64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from stages.shared.model import cpu_attention

HEADS, SIZE, SCALE = 6, 8, 0.3
LENGTHS = (70, 20, 20, 9, 1, 1, 33)


def inside_conversations() -> torch.Tensor:
    blocks = [torch.ones(n, n, dtype=torch.bool).tril() for n in LENGTHS]
    return torch.block_diag(*blocks).bool()


@pytest.mark.parametrize("groups", [6, 3, 1])
@pytest.mark.parametrize(
    ("most_queries", "scores_bytes"),
    [(128, 2**24), (16, 2**24), (128, 4 * HEADS * 70 * 10), (128, 1)],
    ids=["one block", "blocks of 16", "blocks by memory", "one query at a time"],
)
def test_results_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, groups: int, most_queries: int, scores_bytes: int
) -> None:
    monkeypatch.setattr(cpu_attention, "MOST_QUERIES", most_queries)
    monkeypatch.setattr(cpu_attention, "SCORES_BYTES", scores_bytes)
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    inputs = [torch.randn(tokens, n, SIZE, requires_grad=True) for n in (HEADS, groups, groups)]
    q, k, v = inputs
    result = cpu_attention.attend(q, k, v, SCALE, LENGTHS)
    gradient = torch.randn_like(result)
    found = torch.autograd.grad(result, inputs, gradient)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    query, key, value = (x.transpose(0, 1)[None] for x in exact)
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=inside_conversations(), scale=SCALE, enable_gqa=True
    )[0].transpose(0, 1)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    for one, other in zip((result, *found), (expected, *wanted), strict=True):
        assert (one - other).norm() < 1e-6 * other.norm()


def test_scores_are_not_rounded_in_half_precision() -> None:
    """With scores near 30, two bf16 neighbours are 0.125 apart: a factor of 1.13 in each weight."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(100, 4, 64).mul(2).bfloat16() for _ in range(3))
    scale = 0.5
    found = cpu_attention.attend(query, key, value, scale, (100,))
    q, k, v = (x.double().transpose(0, 1)[None] for x in (query, key, value))
    exact = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)
    assert (found - exact).norm() < 5e-3 * exact.norm()
