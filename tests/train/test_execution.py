"""The execution plan, made before a weight is read: refusals, what is set, what is saved."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.shared.core import files, machine
from stages.shared.core.errors import UserError
from stages.shared.model.packing import read_examples
from stages.shared.step.memory import fit
from stages.shared.weights import heap
from stages.train import execution
from stages.train.execution import ExecutionPlan, make_plan
from tests import tiny
from tests.train.running import run, settings, train_on


@pytest.fixture(autouse=True)
def machine_read_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    machine.machine.cache_clear()
    yield
    monkeypatch.undo()
    machine.machine.cache_clear()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("execution")
    return tiny.quantize(root / "model", "nf4"), tiny.prepared(root / "prepared")


def plan(
    folders: tuple[Path, Path], saved: dict[str, Any] | None = None, **changes: Any
) -> ExecutionPlan:
    examples = read_examples(folders[1] / "train.parquet")
    return make_plan(settings(**changes), folders[0], examples, examples, saved)


@pytest.mark.parametrize(
    ("vocabulary", "budget", "expected"),
    [
        (384, "0.5", r"memory: training needs 0\.\d\d GiB .* there are 0\.50"),
        (50, "", r"gives data/prepared token \d+.* has 50 rows"),
    ],
)
def test_training_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: int, budget: str, expected: str
) -> None:
    data, model = tiny.prepared(tmp_path / "prepared"), tiny.quantize(tmp_path / "model", "nf4")
    config = files.read_json(model / "config.json") | {"vocab_size": vocabulary}
    files.write_json(model / "config.json", config)
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    monkeypatch.setenv("QLORA_MEMORY_BUDGET", budget)
    with pytest.raises(UserError, match=expected) as error:
        train_on(settings(), data, model, tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_saved_plan_keeps_why_it_is_not_fused(folders: tuple[Path, Path]) -> None:
    first = plan(folders, lora__dropout=0.1)
    assert first.unfused_because == "lora.dropout is not 0"
    assert plan(folders, first.saved, lora__dropout=0.1).unfused_because == first.unfused_because
    off = first.saved | {"unfused_because": "QLORA_FUSED is false"}
    assert plan(folders, off).unfused_because == "QLORA_FUSED is false"


def test_saved_plan_holds_but_for_what_is_set_now(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def saved(before: dict[str, Any] | None, **variables: str) -> dict[str, Any]:
        machine.machine.cache_clear()
        with monkeypatch.context() as environment:
            for name, value in variables.items():
                environment.setenv(f"QLORA_{name.upper()}", value)
            return plan(folders, before).saved

    first = saved(None, micro_batch_tokens="77", gradient_checkpointing="true", devices="2")
    assert saved(first) == first
    again = saved(first, micro_batch_tokens="55", fused="false", devices="1")
    assert again["micro_batch_tokens"] == 55
    assert again["unfused_because"] == "QLORA_FUSED is false"
    assert again["processes"] == 1
    assert again["gradient_checkpointing"]


@pytest.mark.parametrize("tokens", [None, 77])
def test_unset_settings_are_chosen_and_set_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int | None
) -> None:
    """And above the prediction, freed memory is given back before each step."""
    limits: list[int] = []
    monkeypatch.setattr(heap, "trim_above", limits.append)
    if tokens:
        monkeypatch.setenv("QLORA_MICRO_BATCH_TOKENS", str(tokens))
        monkeypatch.setenv("QLORA_GRADIENT_CHECKPOINTING", "true")
    metrics, *_ = run(tmp_path, tiny.prepared(tmp_path / "prepared"), "nf4", train__max_steps=2)
    assert metrics["micro_batch_tokens"] == (tokens or fit.MICRO_BATCH_TOKENS["cpu"][0])
    assert metrics["gradient_checkpointing"] == bool(tokens)
    assert 0 < metrics["predicted_memory_bytes"] - fit.PROCESS_BYTES < 3e7
    assert limits == [round(execution.TRIM_ABOVE * metrics["predicted_memory_bytes"])] * 2
