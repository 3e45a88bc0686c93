"""A training goes on with another number of devices, equal up to rounding."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages.shared.core import machine
from stages.shared.model.packing import read_examples
from stages.shared.parallel.group import Group
from stages.train import devices
from stages.train.checkpoints import claim
from stages.train.execution import make_plan
from stages.train.recipe import Data
from tests import tiny
from tests.devices import together
from tests.train.running import settings

SHORT: dict[str, Any] = {"train__max_steps": 6, "train__eval_steps": 3, "train__patience": 9}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("devices")
    data, model = tiny.prepared(root / "prepared"), tiny.quantize(root / "model", "fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CHECKPOINT_STEPS", "3")
        machine.machine.cache_clear()
        yield {"train": data / "train.parquet", "eval": data / "eval.parquet", "model": model}
    machine.machine.cache_clear()


def train(group: Group, root: Path, inputs: dict[str, Path]) -> tuple[list[float], int | None]:
    """From the checkpoint after step 3, if there is one; returns losses, and where it began."""
    params = settings(**SHORT)
    data = Data(read_examples(inputs["train"]), read_examples(inputs["eval"]))
    with claim(root if group.is_main else root / str(group.rank), "a", keep=9) as checkpoints:
        shutil.rmtree(checkpoints.folder / "step-000006", ignore_errors=True)
        checkpoint = checkpoints.latest()
        before = checkpoint.manifest["plan"] if checkpoint else None
        plan = make_plan(params, inputs["model"], data.train, data.held_out, before)
        where = (plan, checkpoints, checkpoint) if group.is_main else ()
        result = devices.train_on(group, torch.device("cpu"), params, inputs, data, {}, *where)
        rows = result.history.rows
        losses = [rows[step]["loss"] for step in range(1, 7)]
        losses += [rows[step]["eval_loss"] for step in (0, 3, 6)]
        return losses, result.metrics["resumed_from_step"]


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 3)])
def test_training_resumes_on_another_number_of_devices(
    tmp_path: Path, inputs: dict[str, Path], first: int, then: int
) -> None:
    undisturbed, _ = train(Group(), tmp_path / "alone", inputs)
    together(first, train, tmp_path, inputs)
    losses, resumed_from = together(then, train, tmp_path, inputs)
    assert resumed_from == 3
    assert losses == pytest.approx(undisturbed, rel=1e-4)
    weights = [
        load_file(root / ".checkpoints/a/best/adapter_model.safetensors")
        for root in (tmp_path, tmp_path / "alone")
    ]
    for name, expected in weights[1].items():
        assert (weights[0][name] - expected).norm() <= 1e-3 * expected.norm(), name
