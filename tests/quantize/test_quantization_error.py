"""Codebooks by hand, and relative errors of files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.quantize import quantization_error
from stages.quantize.quantization_error import Base, blocks, linear4
from stages.shared.core.errors import UserError
from stages.shared.weights.checkpoint import Stored, Weights

CPU = torch.device("cpu")


def block(*values: float) -> torch.Tensor:
    """One block of 64: the values, then zeros."""
    return blocks(torch.tensor([values]))


@pytest.mark.parametrize(
    ("values", "alpha", "expected"),
    [
        # The largest magnitude is 7, so a step is 1.
        ((7.0, -7.0, 3.4, -3.6, 0.4, -0.6), 1.0, [7, -7, 3, -4, 0, -1, 0]),
        # Half of 14, so a step is 1 again, and 7 steps are the most.
        ((14.0, -8.0, 2.4, -0.4), 0.5, [7, -7, 2, 0, 0]),
        ((0.0,), 1.0, [0]),
    ],
)
def test_linear4_by_hand(values: tuple[float, ...], alpha: float, expected: list[float]) -> None:
    assert linear4(block(*values), alpha)[0, : len(expected)].tolist() == pytest.approx(expected)


def test_blocks_run_over_the_rows_and_end_in_zeros() -> None:
    weight = torch.arange(1.0, 151.0).view(3, 50)
    in_blocks = blocks(weight)
    assert in_blocks.shape == (3, 64)
    assert torch.equal(in_blocks.flatten()[:150], weight.flatten())
    assert not in_blocks.flatten()[150:].any()
    assert quantization_error.absmax(torch.zeros(2, 64)).all()  # it is divided by


def test_best_alpha_gives_up_one_outlier() -> None:
    # On the levels of a scale of 0.8 but for one weight of 1: its error is 0.2, that of others 0.
    on_levels = torch.arange(64).remainder(15).sub(7)[None] * (0.8 / 7)
    on_levels[:, 0] = 1.0
    assert quantization_error.best_alpha(on_levels) == 0.8
    assert quantization_error.squared(on_levels - linear4(on_levels, 0.8)) == pytest.approx(0.04)


def test_int8_by_hand() -> None:
    weight = torch.tensor([[127.0, -63.6, 0.4, 1.5], [0.0, 0.0, 0.0, 0.0]])
    back = quantization_error.eight_bit(weight)
    assert back[0].tolist() == pytest.approx([127, -64, 0, 2], abs=1e-4)
    assert back[1].tolist() == [0, 0, 0, 0]


def test_codebooks_rank_as_published_on_normal_weights() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    alpha = quantization_error.best_alpha(blocks(weight))
    errors = quantization_error.squared_errors(weight, alpha)
    ranked = sorted(errors, key=lambda kind: errors[kind])
    assert ranked == ["int8", "nf4", "linear4_clipped", "linear4_absmax", "fp4"]
    levels = quantization_error.codebooks(alpha)
    for kind in ("nf4", "fp4"):
        assert sum(level < 0 for level in levels[kind]) == 7
        back = quantization_error.four_bit(weight, kind)
        scales = blocks(weight).abs().amax(1, keepdim=True)
        fractions = blocks(back) / scales
        distance = (fractions[..., None] - torch.tensor(levels[kind])).abs().amin(-1)
        assert float(distance.max()) < 1e-5


def weights(folder: Path, **tensors: torch.Tensor) -> Weights:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return Weights(folder)


def test_relative_error_by_hand(tmp_path: Path) -> None:
    base = weights(tmp_path / "base", a=torch.tensor([[3.0, 0.0]]), b=torch.tensor([[4.0, 0.0]]))
    written = weights(
        tmp_path / "written", a=torch.tensor([[3.0, 0.3]]), b=torch.tensor([[3.6, 0.0]])
    )
    # ‖W − Ŵ‖ = √(0.3² + 0.4²) = 0.5 and ‖W‖ = √(3² + 4²) = 5.
    original = Base(base, CPU)
    measured = quantization_error.measure(original, written, written.parameters)
    assert measured["relative_error"] == pytest.approx(0.1, abs=1e-6)
    assert measured["compared_parameters"] == 4


def test_large_models_are_sampled() -> None:
    matrices = [Stored(str(i), (10, 10), "bf16", 200, {}) for i in range(10)]
    assert quantization_error.every_nth(matrices, 1000) == matrices
    sampled = quantization_error.every_nth(matrices, 999)
    assert [m.name for m in sampled] == ["0", "2", "4", "6", "8"]


def test_base_matrix_must_be_there_and_finite(tmp_path: Path) -> None:
    base = Base(weights(tmp_path / "base", a=torch.tensor([[1.0, torch.nan]])), CPU)
    with pytest.raises(UserError, match="a holds NaN"):
        base.matrix("a")
    with pytest.raises(UserError, match="b is not in the files"):
        base.matrix("b")


def test_parts_of_a_matrix_have_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = weights(tmp_path / "base", a=torch.randn(150, 50))
    original = Base(base, CPU)
    whole = quantization_error.measure(original, base, base.parameters)
    monkeypatch.setattr(quantization_error, "PART_PARAMETERS", 1)
    parts = quantization_error.split_rows(original.matrix("a"))
    assert [len(part) for part in parts] == [64, 64, 22]
    again = quantization_error.measure(original, base, base.parameters)
    assert again["errors"] == pytest.approx(whole["errors"], rel=1e-5)
