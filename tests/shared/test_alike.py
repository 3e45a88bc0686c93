"""Neighbours of a packed row that are padded to one length."""

import torch

from stages.shared.model.cpu_attention import PADDING_TOKENS, length_groups


def groups(*lengths: int) -> list[tuple[int, ...]]:
    return [group.lengths for group in length_groups(lengths)]


def test_neighbours_go_together_while_what_pads_them_is_little():
    assert groups(512, 500) == [(512, 500)]
    assert groups(512, 400) == [(512,), (400,)]
    assert groups(61, 50, 44, 44, 41) == [(61, 50, 44, 44, 41)]
    many = groups(127, *[5] * 200)
    assert many == [(127, 5), (5,) * 199]  # and not 200 rows of 127


def test_padding_never_costs_more_than_a_conversation_of_its_own():
    lengths = tuple(range(300, 0, -7))
    for group in length_groups(lengths):
        longest = max(group.lengths)
        assert sum(longest**2 - n**2 for n in group.lengths) < PADDING_TOKENS**2


def test_they_are_all_of_the_row_in_its_order():
    lengths = (300, 130, 128, 20, 20, 1, 90)
    found = length_groups(lengths)
    assert tuple(n for group in found for n in group.lengths) == lengths
    assert [group.span.start for group in found][1:] == [group.span.stop for group in found][:-1]


def test_what_is_taken_is_padded_with_zeros_and_comes_back():
    row = torch.arange(1.0, 31.0).view(10, 3)
    [group] = length_groups((5, 3, 2))
    taken = group.gather(row)
    assert taken.shape == (3, 16, 3)  # as many as a CPU takes at once
    assert torch.equal(taken[1, :3], row[5:8])
    assert taken.sum() == row.sum()
    back = torch.zeros_like(row)
    group.scatter(taken + (taken == 0) * 9, back)
    assert torch.equal(back, row)


def test_one_alone_is_not_copied():
    row = torch.zeros(10, 3)
    [group] = length_groups((10,))
    assert group.gather(row).data_ptr() == row.data_ptr()
