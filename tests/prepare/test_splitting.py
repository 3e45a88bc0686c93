"""Splits: by the first message, the same every time, with nothing in both."""

from stages.prepare.splitting import Splitter
from stages.shared.chat.conversation import conversation_id
from tests.conversations import assistant, user

QUESTIONS = [f"question {i}" for i in range(2000)]


def held_out(fraction: float, seed: int) -> set[str]:
    splitter = Splitter(fraction, seed)
    return {q for q in QUESTIONS if splitter.split_of("train", q) == "eval"}


def test_about_the_fraction_is_held_out() -> None:
    assert 160 < len(held_out(0.1, 42)) < 240


def test_the_seed_decides_which() -> None:
    assert held_out(0.1, 42) == held_out(0.1, 42)
    assert held_out(0.1, 42) != held_out(0.1, 43)


def test_a_larger_fraction_holds_out_more_of_the_same() -> None:
    assert held_out(0.1, 42) < held_out(0.2, 42)


def test_the_sources_own_split_is_kept() -> None:
    splitter = Splitter(None, 42)
    assert splitter.split_of("eval", "question") == "eval"
    assert splitter.split_of("train", "question") == "train"


def test_duplicates_are_those_with_the_same_messages() -> None:
    splitter = Splitter(0.1, 42)
    one = conversation_id([user("two"), assistant("four")])
    other = conversation_id([user("two"), assistant("4")])
    assert [splitter.is_duplicate(i) for i in (one, other, one)] == [False, False, True]


def test_a_held_out_question_leaks() -> None:
    splitter = Splitter(None, 42)
    splitter.hold_out("two")
    assert splitter.leaks("two")
    assert not splitter.leaks("three")
