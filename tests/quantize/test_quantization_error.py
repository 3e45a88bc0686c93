from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.quantize import quantization_error
from stages.quantize.quantization_error import Layout
from stages.shared.core.errors import UserError
from stages.shared.weights.checkpoint import Stored, Weights

CPU = torch.device("cpu")
LAYOUT = Layout(frozenset(), frozenset(), "model")


def weights(folder: Path, **tensors: torch.Tensor) -> Weights:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return Weights(folder)


def test_relative_error_by_hand(tmp_path: Path):
    base = weights(tmp_path / "base", a=torch.tensor([[3.0, 0.0]]), b=torch.tensor([[4.0, 0.0]]))
    written = weights(
        tmp_path / "written", a=torch.tensor([[3.0, 0.3]]), b=torch.tensor([[3.6, 0.0]])
    )
    # ‖W − Ŵ‖ = √(0.3² + 0.4²) = 0.5 and ‖W‖ = √(3² + 4²) = 5.
    original = quantization_error.Base(base, LAYOUT, CPU)
    found = quantization_error.measure(original, written, written.parameters, CPU)
    assert found.relative_error == pytest.approx(0.1, abs=1e-6)
    assert found.compared_parameters == 4


def test_large_models_are_sampled():
    matrices = [Stored(str(i), (10, 10), "bf16", 200, {}) for i in range(10)]
    assert quantization_error.every_nth(matrices, 1000) == matrices
    assert [m.name for m in quantization_error.every_nth(matrices, 999)] == [
        "0",
        "2",
        "4",
        "6",
        "8",
    ]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    base = weights(tmp_path / "base", a=torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(UserError, match="a holds NaN"):
        quantization_error.Base(base, LAYOUT, CPU).matrix("a")


def test_a_base_with_other_names_is_refused(tmp_path: Path):
    base = weights(tmp_path / "base", a=torch.zeros(1, 1))
    with pytest.raises(UserError, match="b is not in the files"):
        quantization_error.Base(base, LAYOUT, CPU).matrix("b")


def test_a_matrix_in_parts_has_the_blocks_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    base = weights(tmp_path / "base", a=torch.randn(150, 50))
    original = quantization_error.Base(base, LAYOUT, CPU)
    whole = quantization_error.measure(original, base, base.parameters, CPU)
    monkeypatch.setattr(quantization_error, "PART_PARAMETERS", 1)
    assert [len(part) for part in quantization_error.in_parts(original.matrix("a"))] == [64, 64, 22]
    parts = quantization_error.measure(original, base, base.parameters, CPU)
    assert parts.errors == pytest.approx(whole.errors, rel=1e-5)
