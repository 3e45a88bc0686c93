"""Attention as batched matmuls, against torch's own in fp64; and its groups of lengths."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from stages.shared.model import cpu_attention
from stages.shared.model.cpu_attention import PADDING_TOKENS, length_groups
from tests.shared.model.flash_kernel import assert_exact

HEADS, SIZE, SCALE = 6, 8, 0.3
LENGTHS = (70, 20, 20, 9, 1, 1, 33)


@pytest.mark.parametrize("key_heads", [6, 3, 1])
@pytest.mark.parametrize(
    ("most_queries", "scores_bytes"),
    [(128, 2**24), (16, 2**24), (128, 4 * HEADS * 70 * 10), (128, 1)],
    ids=["one block", "blocks of 16", "blocks by memory", "one query at a time"],
)
def test_attention_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, key_heads: int, most_queries: int, scores_bytes: int
) -> None:
    monkeypatch.setattr(cpu_attention, "MOST_QUERIES", most_queries)
    monkeypatch.setattr(cpu_attention, "SCORES_BYTES", scores_bytes)
    torch.manual_seed(0)
    shapes = [(sum(LENGTHS), n, SIZE) for n in (HEADS, key_heads, key_heads)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    result = cpu_attention.attend(inputs[0], inputs[1], inputs[2], SCALE, LENGTHS)
    assert_exact(result, inputs, SCALE, LENGTHS)


def test_scores_are_not_rounded_in_half_precision() -> None:
    """With scores near 30, two bf16 neighbours are 0.125 apart: a factor of 1.13 in each weight."""
    torch.manual_seed(0)
    inputs = [torch.randn(100, 4, 64).mul(2).bfloat16() for _ in range(3)]
    result = cpu_attention.attend(inputs[0], inputs[1], inputs[2], 0.5, (100,))
    q, k, v = (x.double().transpose(0, 1)[None] for x in inputs)
    exact = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)[0].transpose(0, 1)
    assert (result - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ((512, 500), [(512, 500)]),
        ((512, 400), [(512,), (400,)]),
        ((61, 50, 44, 44, 41), [(61, 50, 44, 44, 41)]),
        ((127, *[5] * 200), [(127, 5), (5,) * 199]),  # and not 200 rows of 127
    ],
)
def test_neighbours_are_grouped_while_padding_is_little(
    lengths: tuple[int, ...], groups: list[tuple[int, ...]]
) -> None:
    assert [group.lengths for group in length_groups(lengths)] == groups


def test_groups_cover_the_row_with_bounded_padding() -> None:
    lengths = tuple(range(300, 0, -7))
    groups = length_groups(lengths)
    assert tuple(n for group in groups for n in group.lengths) == lengths
    assert [g.span.start for g in groups][1:] == [g.span.stop for g in groups][:-1]
    for group in groups:
        longest = max(group.lengths)
        assert sum(longest**2 - n**2 for n in group.lengths) < PADDING_TOKENS**2


def test_gather_pads_with_zeros_and_scatter_reverses_it() -> None:
    row = torch.arange(1.0, 31.0).view(10, 3)
    [group] = length_groups((5, 3, 2))
    padded = group.gather(row)
    assert padded.shape == (3, 16, 3)  # as many as a CPU takes at once
    assert torch.equal(padded[1, :3], row[5:8])
    assert padded.sum() == row.sum()
    back = torch.zeros_like(row)
    group.scatter(padded + (padded == 0) * 9, back)
    assert torch.equal(back, row)
    [alone] = length_groups((10,))
    assert alone.gather(row).data_ptr() == row.data_ptr()  # not copied
