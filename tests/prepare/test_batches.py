"""Batches of rows, and the one that is under way in another thread."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.prepare import batches
from stages.prepare.sources import Source
from stages.shared.core import progress


def read(folder: Path, lines: list[str]) -> list[batches.Batch]:
    path = folder / "train.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    with progress.bar(total=None, desc="read", unit="B") as bar:
        found = list(batches.read(Source("train", path, path.name), None, bar))
        assert bar.n == path.stat().st_size
    return found


GOOD = '{"text": "### Human: two### Assistant: 2"}'


def test_a_batch_is_bounded_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ROWS", 3)
    assert [batch.rows for batch in read(tmp_path, [GOOD] * 7)] == [3, 3, 1]


def test_a_batch_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BYTES", 3 * len(GOOD))
    assert [batch.rows for batch in read(tmp_path, [GOOD] * 7)] == [3, 3, 1]


def test_a_form_is_that_of_the_first_row_that_shows_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ROWS", 1)
    alpaca = '{"instruction": "two", "output": "2"}'
    unknown, known, other = read(tmp_path, ['{"x": 1}', GOOD, alpaca])
    assert (unknown.form, known.form, other.form) == (None, "guanaco", "guanaco")
    assert unknown.unusable == [(1, "no known form in x")]
    assert other.unusable == [(3, "no `text` in it; found instruction, output")]


def test_ahead_keeps_the_order_and_holds_two_items() -> None:
    taken: list[int] = []
    given: list[int] = []
    threads = set()

    def items() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            # However many rows a file has: one item is worked on, one waits.
            assert len(taken) - len(given) <= 2
            yield number

    def work(number: int) -> int:
        threads.add(threading.current_thread())
        return number * number

    for number, square in batches.ahead(work, items()):
        given.append(number)
        assert square == number * number
    assert given == list(range(50))
    assert len(threads) == 1
    assert threading.current_thread() not in threads


def test_the_next_item_is_taken_while_the_first_is_worked_on() -> None:
    next_taken = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        next_taken.set()
        yield 1

    def work(number: int) -> bool:
        return next_taken.wait(timeout=10)

    assert list(batches.ahead(work, items())) == [(0, True), (1, True)]


def test_the_caller_goes_before_the_other_thread() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    [(_, other)] = batches.ahead(lambda _: priority(), [0])
    assert other == min(priority() + 5, 19)


def test_an_error_in_the_other_thread_is_raised() -> None:
    def work(number: int) -> float:
        return 1 / number

    found = batches.ahead(work, [1, 0, 1])
    assert next(found) == (1, 1.0)
    with pytest.raises(ZeroDivisionError):
        next(found)
