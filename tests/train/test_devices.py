"""Training resumes on another number of devices, equal up to rounding."""

import os
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
WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"method": "full", "learning_rate": 1e-3, "weight_decay": 0.1},
    "full, 8-bit": {"method": "full", "learning_rate": 1e-3, "optimizer": "adamw_8bit"},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("devices")
    data, model = tiny.prepared(root / "prepared"), tiny.quantize(root / "model", "fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CHECKPOINT_STEPS", "3")
        yield {"train": data / "train.parquet", "eval": data / "eval.parquet", "model": model}
    machine.machine.cache_clear()


def train(
    group: Group, root: Path, inputs: dict[str, Path], way: str
) -> tuple[list[float], int | None]:
    """From the checkpoint after step 3, if there is one; returns losses, and where it began."""
    os.environ |= {"QLORA_DEVICES": str(group.size), "QLORA_SHARD": str(way != "lora").lower()}
    machine.machine.cache_clear()
    params = settings(**SHORT, **{f"train__{key}": value for key, value in WAYS[way].items()})
    data = Data(read_examples(inputs["train"]), read_examples(inputs["eval"]))
    with claim(root if group.is_main else root / str(group.rank), "a", keep=9) as checkpoints:
        shutil.rmtree(checkpoints.folder / "step-000006", ignore_errors=True)
        checkpoint = checkpoints.latest()
        before = checkpoint.manifest["plan"] if checkpoint else None
        plan = make_plan(params, inputs["model"], data.train, data.held_out, before)
        assert plan.sharded == (way != "lora" and group.size > 1)
        where = (plan, checkpoints, checkpoint) if group.is_main else ()
        result = devices.train_on(group, torch.device("cpu"), params, inputs, data, {}, *where)
        rows = result.history.rows
        losses = [rows[step]["loss"] for step in range(1, 7)]
        losses += [rows[step]["eval_loss"] for step in (0, 3, 6)]
        return losses, result.metrics["resumed_from_step"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 3)])
def test_training_resumes_on_another_number_of_devices(
    tmp_path: Path, inputs: dict[str, Path], first: int, then: int, way: str
) -> None:
    """Full fine-tuning is sharded on two and three."""
    alone = tmp_path / "alone"
    undisturbed, _ = together(1, train, alone, inputs, way)
    together(first, train, tmp_path, inputs, way)
    losses, resumed_from = together(then, train, tmp_path, inputs, way)
    assert resumed_from == 3
    assert losses == pytest.approx(undisturbed, rel=1e-4 if way == "lora" else 1e-5)
    best = ".checkpoints/a/best/*.safetensors"
    weights = [load_file(next(root.glob(best))) for root in (tmp_path, alone)]
    assert weights[0].keys() == weights[1].keys()
    for name, expected in weights[1].items():
        assert (weights[0][name] - expected).norm() <= 1e-3 * expected.norm(), name
