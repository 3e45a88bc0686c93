"""What ends a training early, and what it leaves."""

from pathlib import Path

import pytest
import torch

from stages.shared.core.errors import UserError
from stages.shared.examples import read_examples
from stages.shared.step import adapter
from stages.train.checkpoints import claim
from stages.train.computing import Computing
from stages.train.loop import Data, Loop
from stages.train.processes import Processes
from tests import tiny
from tests.train.running import settings

CPU = torch.device("cpu")


def test_a_gradient_that_is_not_finite_stops_at_its_step(tmp_path: Path) -> None:
    """With a loss that is finite: the gradient overflows at the fourth step."""
    folder = tiny.prepared(tmp_path / "prepared")
    data = Data(*(read_examples(folder / f"{split}.parquet") for split in ("train", "eval")))
    params = settings(train__max_grad_norm=1e9)
    torch.manual_seed(0)
    model = adapter.load_for_lora(tiny.quantize(tmp_path / "model", "fp32"), params.lora, CPU)
    how = Computing(CPU, torch.float32, 4096, False, 1)
    with claim(tmp_path, "name", keep=2) as checkpoints:
        loop = Loop(model, data, params.train, how, Processes(), checkpoints, checkpoint_every=1)
        parameter = next(p for n, p in model.named_parameters() if "lora_B" in n)
        parameter.register_hook(lambda g: g * torch.inf if loop.done == 3 else g)
        with pytest.raises(UserError) as error:
            loop.run()
        line = str(error.value)
        assert line.startswith("training stopped at step 4: the gradient norm is")
        assert "expected a finite number; learning rate 0.00" in line
        rows = ", ".join(map(str, loop.steps.drawn(3)))
        assert f"rows {rows} of data/prepared/train.parquet" in line
        assert all(weight.isfinite().all() for weight in model.parameters())
        newest = checkpoints.latest()
        assert newest is not None
        assert newest.manifest["step"] == 3  # the last good one stays


def test_a_model_that_scores_nothing_finite_is_refused_at_once(tmp_path: Path) -> None:
    folder = tiny.prepared(tmp_path / "prepared")
    data = Data(*(read_examples(folder / f"{split}.parquet") for split in ("train", "eval")))
    params = settings()
    model = adapter.load_for_lora(tiny.quantize(tmp_path / "model", "fp32"), params.lora, CPU)
    with torch.no_grad():
        model.get_input_embeddings().weight[5:].fill_(torch.nan)
    how = Computing(CPU, torch.float32, 4096, False, 1)
    with claim(tmp_path, "name", keep=2) as checkpoints:
        loop = Loop(model, data, params.train, how, Processes(), checkpoints, checkpoint_every=1)
        with pytest.raises(UserError, match="after step 0: the held-out loss is nan"):
            loop.run()


def test_a_schedule_is_that_of_its_parameters(tmp_path: Path) -> None:
    """Of 12 steps the first warms up, from zero; the last would end at zero."""
    folder = tiny.prepared(tmp_path / "prepared")
    data = Data(*(read_examples(folder / f"{split}.parquet") for split in ("train", "eval")))
    params = settings(train__scheduler="linear", train__learning_rate=0.011)
    model = adapter.load_for_lora(tiny.quantize(tmp_path / "model", "fp32"), params.lora, CPU)
    how = Computing(CPU, torch.float32, 4096, False, 1)
    with claim(tmp_path, "name", keep=2) as checkpoints:
        loop = Loop(model, data, params.train, how, Processes(), checkpoints, checkpoint_every=99)
        loop.run()
    assert all(weight.grad is None for weight in model.parameters())  # none beside an evaluation
    rates = [loop.curve.rows[step]["learning_rate"] for step in range(1, 13)]
    assert rates == pytest.approx([0, *(0.001 * left for left in range(11, 0, -1))])
    assert [r for r, row in loop.curve.rows.items() if "eval_loss" in row] == [0, 6, 12]
