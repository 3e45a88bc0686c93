import pytest
import torch

from stages.quantize import quantization_error as levels


def block(*values: float) -> torch.Tensor:
    """One block of 64: the values, then zeros."""
    return levels.blocks(torch.tensor([values]))


def test_linear4_by_hand():
    # The largest magnitude is 7, so a step is 1.
    back = levels.linear4(block(7.0, -7.0, 3.4, -3.6, 0.4, -0.6))
    assert back[0, :6].tolist() == pytest.approx([7, -7, 3, -4, 0, -1])
    assert not back[0, 6:].any()


def test_clipped_linear4_by_hand():
    # Half of 14, so a step is 1 again, and what lies beyond 7 steps becomes 7.
    back = levels.linear4(block(14.0, -8.0, 2.4, -0.4), alpha=0.5)
    assert back[0, :4].tolist() == pytest.approx([7, -7, 2, 0])


def test_a_block_of_zeros_stays_zero():
    zeros = torch.zeros(2, levels.BLOCK)
    assert not levels.linear4(zeros).any()
    assert not levels.normalized(zeros).any()


def test_blocks_run_over_the_rows_and_end_in_zeros():
    weight = torch.arange(1.0, 151.0).view(3, 50)
    in_blocks = levels.blocks(weight)
    assert in_blocks.shape == (3, 64)
    assert torch.equal(in_blocks.flatten()[:150], weight.flatten())
    assert not in_blocks.flatten()[150:].any()


def test_the_best_alpha_gives_up_one_outlier_for_all_the_others():
    # On the levels of a scale of 0.8 but for one weight of 1: its error is 0.2, that of others 0.
    on_levels = torch.arange(64).remainder(15).sub(7)[None] * (0.8 / 7)
    on_levels[:, 0] = 1.0
    assert levels.best_alpha(on_levels) == 0.8
    assert levels.squared(on_levels - levels.linear4(on_levels, 0.8)) == pytest.approx(0.04)


@pytest.mark.parametrize(("kind", "levels_below_zero"), [("nf4", 7), ("fp4", 7)])
def test_the_library_finds_the_nearest_level(kind: str, levels_below_zero: int):
    torch.manual_seed(0)
    ladder = torch.tensor(levels.codebooks(1.0)[kind])
    assert int((ladder < 0).sum()) == levels_below_zero
    weight = torch.randn(8, 64)
    fractions = levels.normalized(weight)
    nearest = ladder[(fractions[..., None] - ladder).abs().argmin(dim=-1)]
    expected = nearest * weight.abs().amax(dim=1, keepdim=True)
    assert torch.allclose(levels.four_bit(weight, kind), expected, atol=1e-6)


def test_int8_by_hand():
    weight = torch.tensor([[127.0, -63.6, 0.4, 1.5], [0.0, 0.0, 0.0, 0.0]])
    back = levels.eight_bit(weight)
    assert back[0].tolist() == pytest.approx([127, -64, 0, 2], abs=1e-4)
    assert back[1].tolist() == [0, 0, 0, 0]


def test_on_normal_weights_nf4_beats_what_it_was_made_to_beat():
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    errors = levels.squared_errors(weight, levels.best_alpha(levels.blocks(weight)))
    assert sorted(errors, key=lambda kind: errors[kind]) == [
        "int8",
        "nf4",
        "linear4_clipped",
        "linear4_absmax",
        "fp4",
    ]
