"""More rows take no more memory; more threads change no byte."""

import tracemalloc
from typing import Any

import pytest

from stages.prepare import batches, preparing, writing
from stages.prepare.settings import Prepare
from tests.prepare.helpers import DEFAULTS, Stage, row


def rows(count: int) -> list[dict[str, Any]]:
    """Each with an unusable one behind it."""
    good = (row(f"what is two plus {i}" + " plus two" * 20, str(i)) for i in range(count))
    return [one for pair in ((g, {"text": "### Human: two"}) for g in good) for one in pair]


def peak_bytes(stage: Stage, count: int) -> int:
    """Of Python's and numpy's objects, while the stage runs on files that lie there already."""
    stage.prepare(rows(count), max_rejected=0.5, max_length=512)
    wanted = Prepare(**(DEFAULTS | {"max_rejected": 0.5, "max_length": 512}))
    tracemalloc.start()
    try:
        preparing.prepare(stage.raw, stage.tokenizer, stage.out, wanted)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_two_batches(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ROWS", 100)
    monkeypatch.setattr(writing, "_ROWS", 100)
    few, many = (peak_bytes(stage, count) for count in (400, 2000))
    assert many < 1.2 * few


def test_threads_change_no_byte(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ROWS", 50)
    found = []
    for parallel in ("false", "true"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        figures = stage.prepare(rows(200), max_rejected=0.5, max_length=512)
        found.append((figures, {path.name: path.read_bytes() for path in stage.out.iterdir()}))
    assert found[0] == found[1]
