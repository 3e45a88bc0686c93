"""The whole stage: what is in which split, and in none."""

import pytest

from stages.prepare import batches
from stages.shared.core.errors import UserError
from tests.prepare.helpers import ROWS, Stage, row


def test_duplicates_are_removed(stage: Stage) -> None:
    figures = stage.prepare([*ROWS, *ROWS[:5], row("\twhat is two plus 0\r\n", " 2\r\n")])
    assert figures["duplicates"] == 6
    assert figures["rows_in"] == 26
    assert figures["train"]["conversations"] + figures["eval"]["conversations"] == 20


def test_equal_first_messages_stay_together(stage: Stage) -> None:
    rows = [row(f"question {i % 10}", f"reply {i}") for i in range(100)]
    stage.prepare(rows)
    questions = {f"question {i}" for i in range(10)}
    assert stage.questions("train") | stage.questions("eval") == questions
    assert not stage.questions("train") & stage.questions("eval")


def test_what_is_held_out_is_taken_out_of_train(stage: Stage) -> None:
    figures = stage.prepare([*ROWS, row("what is two plus 3", "five")], ROWS[:4])
    assert figures["leaked"] == 5
    assert figures["eval"]["conversations"] == 4
    assert figures["train"]["conversations"] == 16
    assert not stage.questions("train") & stage.questions("eval")


def test_a_whole_train_split_that_stands_in_eval(stage: Stage) -> None:
    with pytest.raises(UserError, match=r"none is left for the train split .* 4 of train begin"):
        stage.prepare(ROWS[:4], ROWS)


def test_max_rows_counts_conversations_that_are_accepted(stage: Stage) -> None:
    whole = stage.prepare(ROWS)
    held_out = stage.rows("eval")
    train = stage.rows("train")
    figures = stage.prepare([{"text": "x"}, ROWS[0], *ROWS], max_rows=5, max_rejected=0.1)
    assert stage.rows("train") == train[:5]
    assert stage.rows("eval") == held_out
    assert figures["beyond_max_rows"] + 5 == whole["train"]["conversations"]


def test_max_rows_stops_reading_where_the_source_has_its_own_eval(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ROWS", 2)
    figures = stage.prepare(ROWS[4:], ROWS[:4], max_rows=3)
    assert figures["rows_in"] == 8
    assert figures["train"]["conversations"] == 3
