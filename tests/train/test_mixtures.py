"""Training of a mixture: stopped and resumed, it ends with the same bytes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from stages.shared.core.errors import Stopped
from stages.train.checkpoints import claim
from stages.train.devices import TrainResult, train
from stages.train.recipe import Recipe
from tests import tiny
from tests.architectures import MIXTURES, saved
from tests.train.running import settings

PARAMS = settings(train__router_aux_loss=0.1, train__epochs=1, lora__dropout=0.1)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_resumed_training_of_a_mixture_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = saved(tmp_path / "model", kind, MIXTURES[kind])
    data = tiny.prepared(tmp_path / "data", conversations=16, held_out=4)
    inputs = {"train": data / "train.parquet", "eval": data / "eval.parquet", "model": model}

    def run(name: str) -> tuple[TrainResult, bytes]:
        with claim(tmp_path / name, "a-training", keep=2) as checkpoints:
            result = train(PARAMS, inputs, checkpoints)
            return result, (checkpoints.best / "adapter_model.safetensors").read_bytes()

    def step(recipe: Recipe, *args: Any) -> float:
        if recipe.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(recipe, *args)

    whole, expected = run("whole")
    take_step = Recipe.take_step
    with monkeypatch.context() as changes, pytest.raises(Stopped):
        changes.setattr(Recipe, "take_step", step)
        run("resumed")
    resumed, found = run("resumed")
    assert resumed.metrics["resumed_from_step"] in (2, 3)
    assert found == expected
    assert resumed.history == whole.history
    assert whole.history.rows[1]["router_aux_loss"] > 1
    assert whole.metrics["trainable_by_kind"]["experts"] > 0
    assert [len(layer) for layer in whole.metrics["expert_use"]["after"]["shares"]] == [4, 4]
