"""Training asks the plan first: what does not fit is refused before a weight is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.shared.core import files, machine
from stages.shared.core.errors import UserError
from stages.shared.model.packing import read_examples
from stages.shared.step import fit
from stages.shared.weights import heap
from stages.train import execution
from tests import tiny
from tests.train.running import run, settings, train_on


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of the machine are read again, before and after."""
    machine.machine.cache_clear()
    yield
    monkeypatch.undo()
    machine.machine.cache_clear()


def test_what_cannot_fit_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.prepared(tmp_path / "prepared")
    model = tiny.quantize(tmp_path / "quantized", "nf4")
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    monkeypatch.setenv("QLORA_MEMORY_BUDGET", "0.5")
    with pytest.raises(
        UserError, match=r"memory: training needs 0\.\d\d GiB .* there are 0\.50"
    ) as error:
        train_on(settings(), data, model, tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_a_token_without_an_embedding_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    data = tiny.prepared(tmp_path / "prepared")
    model = tiny.quantize(tmp_path / "quantized", "nf4")
    config = files.read_json(model / "config.json") | {"vocab_size": 50}
    files.write_json(model / "config.json", config)
    with pytest.raises(UserError, match=r"gives data/prepared token \d+.* has 50 rows"):
        train_on(settings(), data, model, tmp_path / "adapter")


def test_a_resumed_training_says_why_it_is_not_fused(tmp_path: Path) -> None:
    data, model = tiny.prepared(tmp_path / "prepared"), tiny.quantize(tmp_path / "model", "nf4")
    examples = read_examples(data / "train.parquet")
    wanted = settings(lora__dropout=0.1)
    first = execution.make_plan(wanted, model, examples, examples)
    assert first.unfused_because == "lora.dropout is not 0"
    again = execution.make_plan(wanted, model, examples, examples, first.saved)
    assert again.unfused_because == first.unfused_because
    off = first.saved | {"unfused_because": "QLORA_FUSED is false"}
    again = execution.make_plan(settings(), model, examples, examples, off)
    assert again.unfused_because == "QLORA_FUSED is false"


def test_a_resumed_training_computes_as_before_but_for_what_is_set_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = tiny.prepared(tmp_path / "prepared"), tiny.quantize(tmp_path / "model", "nf4")
    examples = read_examples(data / "train.parquet")

    def resolved(noted: dict[str, Any] | None, **wanted: str) -> dict[str, Any]:
        machine.machine.cache_clear()
        for name, value in wanted.items():
            monkeypatch.setenv(f"QLORA_{name.upper()}", value)
        return execution.make_plan(settings(), model, examples, examples, noted).saved

    first = resolved(
        None, micro_batch_tokens="77", gradient_checkpointing="true", workers="1", devices="2"
    )
    for name in ("MICRO_BATCH_TOKENS", "GRADIENT_CHECKPOINTING", "WORKERS", "DEVICES"):
        monkeypatch.delenv(f"QLORA_{name}")
    assert resolved(first) == first
    again = resolved(first, micro_batch_tokens="55", fused="false", devices="1")
    assert again["micro_batch_tokens"] == 55
    assert again["unfused_because"] == "QLORA_FUSED is false"
    assert again["processes"] == 1
    assert again["gradient_checkpointing"]


def test_a_step_never_has_more_workers_than_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_WORKERS", "12")
    assert fit.most_workers(3, 12) == 3
    data, model = tiny.prepared(tmp_path / "prepared"), tiny.quantize(tmp_path / "model", "nf4")
    examples = read_examples(data / "train.parquet")
    found = execution.make_plan(settings(train__batch_size=2), model, examples, examples)
    assert found.workers == 2


def test_what_is_unset_is_chosen_and_what_is_set_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.prepared(tmp_path / "prepared")
    monkeypatch.setattr(fit, "most_workers", lambda batch_size, wanted: wanted or 2)
    for name, tokens, checkpointing in (("unset", None, None), ("set", 77, True)):
        machine.machine.cache_clear()
        if tokens:
            monkeypatch.setenv("QLORA_WORKERS", "1")
            monkeypatch.setenv("QLORA_MICRO_BATCH_TOKENS", str(tokens))
            monkeypatch.setenv("QLORA_GRADIENT_CHECKPOINTING", str(checkpointing))
        metrics, *_ = run(tmp_path / name, data, "nf4", train__max_steps=2)
        assert metrics["workers"] == (1 if tokens else 2)
        assert metrics["micro_batch_tokens"] == (tokens or fit.WORKER_TOKENS)
        assert metrics["gradient_checkpointing"] == bool(checkpointing)
        beside = fit.PROCESS_BYTES + (0 if tokens else fit.WORKER_BYTES)
        assert 0 < metrics["predicted_memory_bytes"] - beside < 3e7


def test_freed_memory_is_given_back_before_a_step_above_what_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_WORKERS", "1")
    limits: list[int] = []
    monkeypatch.setattr(heap, "trim_above", limits.append)
    data = tiny.prepared(tmp_path / "prepared")
    metrics, *_ = run(tmp_path, data, "nf4", train__max_steps=3)
    assert limits == [metrics["predicted_memory_bytes"]] * 3
