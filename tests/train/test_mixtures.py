"""Training of a mixture: stopped, killed or evaluated more often, it ends with the same bytes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from stages.shared.core import machine
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
    take_step = Recipe.take_step

    def run(name: str, params: Any = PARAMS) -> tuple[TrainResult, bytes]:
        with claim(tmp_path / name, "a-training", keep=2) as checkpoints:
            result = train(params, inputs, checkpoints)
            return result, (checkpoints.best / "adapter_model.safetensors").read_bytes()

    def end_by(number: int) -> None:
        def step(recipe: Recipe, *args: Any) -> float:
            if recipe.step == 2:
                os.kill(os.getpid(), number)
            return take_step(recipe, *args)

        monkeypatch.setattr(Recipe, "take_step", step)

    whole, expected = run("whole")
    with pytest.raises(Stopped):
        end_by(signal.SIGTERM)
        run("stopped")
    monkeypatch.setenv("QLORA_CHECKPOINT_STEPS", "1")
    machine.machine.cache_clear()
    if not (child := os.fork()):
        end_by(signal.SIGKILL)
        run("killed")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    monkeypatch.setattr(Recipe, "take_step", take_step)
    for name, steps in (("stopped", (2, 3)), ("killed", (1, 2))):
        resumed, found = run(name)
        assert resumed.metrics["resumed_from_step"] in steps
        assert found == expected
        assert resumed.history == whole.history
    machine.machine.cache_clear()
    assert whole.history.rows[1]["router_aux_loss"] > 1
    assert whole.metrics["trainable_by_kind"]["experts"] > 0
    assert [len(layer) for layer in whole.metrics["expert_use"]["after"]["shares"]] == [4, 4]
    often = PARAMS.train.model_copy(update={"eval_steps": 1, "patience": 9})
    evaluated, _ = run("evaluated", PARAMS.model_copy(update={"train": often}))
    losses = [[one.history.rows[s]["loss"] for s in range(1, 5)] for one in (whole, evaluated)]
    assert losses[0] == losses[1]
