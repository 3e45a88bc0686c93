"""The loop of a training: its schedule, and what ends it early."""

import itertools
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.shared.core import machine
from stages.shared.core.errors import Stopped, UserError
from stages.shared.model import packing
from stages.shared.model.packing import read_examples
from stages.shared.parallel.group import Group
from stages.shared.parallel.interruption import Interruption
from stages.shared.step import adapter, gradient
from stages.train import recipe as recipes
from stages.train.checkpoints import Checkpoints, claim
from stages.train.config import Params
from stages.train.execution import ExecutionPlan
from stages.train.recipe import Data, Recipe
from tests import tiny
from tests.train.running import settings, train_on

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Path]:
    """Conversations, and the folder of a model, which each training loads for itself."""
    root = tmp_path_factory.mktemp("inputs")
    folder = tiny.prepared(root / "prepared")
    data = Data(*(read_examples(folder / f"{split}.parquet") for split in ("train", "eval")))
    return data, tiny.quantize(root / "model", "fp32")


def recipe_of(inputs: tuple[Data, Path], params: Params, checkpoints: Checkpoints) -> Recipe:
    data, folder = inputs
    model = adapter.load_for_lora(folder, params.lora, CPU)
    how = ExecutionPlan(CPU, torch.float32, 4096, False, 1)
    return Recipe(model, data, params.train, how, checkpoints, Group())


def test_a_gradient_that_is_not_finite_stops_at_its_step(
    inputs: tuple[Data, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loss that is finite: the gradient overflows at the fourth step."""
    monkeypatch.setattr(recipes, "machine", lambda: machine.Machine(checkpoint_steps=1))
    params = settings(train__max_grad_norm=1e9)
    torch.manual_seed(0)
    with claim(tmp_path, "name", keep=2) as checkpoints:
        recipe = recipe_of(inputs, params, checkpoints)
        model = recipe.model
        parameter = next(p for n, p in model.named_parameters() if "lora_B" in n)
        parameter.register_hook(lambda g: g * torch.inf if recipe.step == 3 else g)
        with pytest.raises(UserError) as error:
            recipe.run(Interruption())
        line = str(error.value)
        assert line.startswith("training stopped at step 4: the gradient norm is")
        assert "; learning rate 0.00" in line
        rows = ", ".join(map(str, recipe.schedule.rows(3)))
        assert f"rows {rows} of data/prepared/train.parquet" in line
        assert all(weight.isfinite().all() for weight in model.parameters())
        newest = checkpoints.latest()
        assert newest is not None
        assert newest.manifest["step"] == 3  # the last good one stays


def test_a_model_that_scores_nothing_finite_is_refused_at_once(
    inputs: tuple[Data, Path], tmp_path: Path
) -> None:
    with claim(tmp_path, "name", keep=2) as checkpoints:
        recipe = recipe_of(inputs, settings(), checkpoints)
        with torch.no_grad():
            recipe.model.get_input_embeddings().weight[5:].fill_(torch.nan)
        with pytest.raises(UserError, match="after step 0: the held-out loss is nan"):
            recipe.run(Interruption())


def test_a_schedule_is_that_of_its_parameters(inputs: tuple[Data, Path], tmp_path: Path) -> None:
    """Of 12 steps the first warms up, from zero; the last would end at zero."""
    params = settings(train__scheduler="linear", train__learning_rate=0.011)
    with claim(tmp_path, "name", keep=2) as checkpoints:
        recipe = recipe_of(inputs, params, checkpoints)
        recipe.run(Interruption())
    assert all(
        weight.grad is None for weight in recipe.model.parameters()
    )  # none beside an evaluation
    rates = [recipe.history.rows[step]["learning_rate"] for step in range(1, 13)]
    assert rates == pytest.approx([0, *(0.001 * left for left in range(11, 0, -1))])
    assert [r for r, row in recipe.history.rows.items() if "eval_loss" in row] == [0, 6, 12]


def finish(folder: Path, data: Path) -> dict[str, bytes]:
    """Train to the end, from wherever the folder's checkpoints stand."""
    result = train_on(SHORT, data, folder.parent / "quantized", folder / "adapter")
    result.history.write(folder / "loss.csv")
    kept = [folder / "loss.csv", folder / "adapter/adapter_model.safetensors"]
    return {path.name: path.read_bytes() for path in kept}


SHORT = settings(train__max_steps=4, train__eval_steps=2, train__patience=9, lora__dropout=0.1)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, Path, dict[str, bytes]]]:
    """A folder, its data, and what a training without a signal ends in."""
    root = tmp_path_factory.mktemp("stops")
    data = tiny.prepared(root / "prepared")
    tiny.quantize(root / "quantized", "nf4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CHECKPOINT_STEPS", "1")
        machine.machine.cache_clear()
        (root / "whole").mkdir()
        yield root, data, finish(root / "whole", data)
    machine.machine.cache_clear()


@pytest.mark.parametrize(
    ("owner", "name", "call", "steps"),
    [
        pytest.param(adapter, "load_for_lora", 1, None, id="while it loads"),
        pytest.param(packing, "pack", 1, None, id="in the first evaluation"),
        pytest.param(adapter, "save", 1, 0, id="while the best is saved"),
        pytest.param(Checkpoints, "write", 1, 1, id="while the first checkpoint is written"),
        pytest.param(Recipe, "checkpoint", 1, 1, id="between step and checkpoint"),
        pytest.param(gradient, "accumulate", 3, 2, id="in the third step"),
        pytest.param(gradient, "clip", 3, 3, id="in the third update"),
        pytest.param(Recipe, "evaluate", 2, 2, id="in the second evaluation"),
    ],
)
def test_a_signal_anywhere_stops_and_resumes_to_the_same_bytes(
    uninterrupted: tuple[Path, Path, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    steps: int | None,
) -> None:
    root, data, expected = uninterrupted
    number = signal.SIGINT if call % 2 else signal.SIGTERM
    folder = Path(tempfile.mkdtemp(dir=root))
    original, calls = getattr(owner, name), itertools.count(1)

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if os.getpid() == pid and next(calls) == call:
            os.kill(pid, number)
        return original(*args, **kwargs)

    pid = os.getpid()
    monkeypatch.setattr(owner, name, signalled)
    with pytest.raises(Stopped) as stopped:
        train_on(SHORT, data, root / "quantized", folder / "adapter")
    monkeypatch.setattr(owner, name, original)
    assert stopped.value.signal == number
    written = sorted(p.name for p in folder.glob(".checkpoints/*/step-*"))
    assert written[-1:] == ([] if steps is None else [f"step-{steps:06d}"])
    assert finish(folder, data) == expected
