"""Splits: by the first message, the same every time, with nothing in both."""

import random

import numpy as np

from stages.prepare.splitting import Splitter, digest_of, is_held_out

QUESTIONS = [f"question {i}" for i in range(2000)]


def held_out(fraction: float, seed: int) -> set[str]:
    return {question for question in QUESTIONS if is_held_out(question, fraction, seed)}


def test_a_fraction_is_held_out_by_the_seed() -> None:
    assert 160 < len(held_out(0.1, 42)) < 240
    assert held_out(0.1, 42) != held_out(0.1, 43)
    assert held_out(0.1, 42) < held_out(0.2, 42)


def assign(splitter: Splitter, rows: list[tuple[str, str, str]]) -> list[str]:
    """Rows of `rejected`, `eval` or `train`, a conversation and its first message."""
    where, ids, questions = zip(*rows, strict=True)
    return splitter.assign(
        np.array(where) != "rejected",
        np.array(where) == "eval",
        np.array([*map(digest_of, ids)], "S16"),
        np.array([*map(digest_of, questions)], "S16"),
    ).tolist()


def test_each_outcome() -> None:
    splitter = Splitter(own_eval=True, max_rows=2)
    assert assign(splitter, [("eval", "a", "p"), ("rejected", "", ""), ("eval", "a", "p")]) == [
        *("eval", "rejected", "duplicates")
    ]
    rows = [("train", "b", "p"), ("train", "c", "q"), ("train", "c", "q"), ("train", "d", "q")]
    assert assign(splitter, rows) == ["leaked", "train", "duplicates", "train"]
    assert splitter.is_full
    assert assign(splitter, [("train", "e", "r"), ("train", "c", "q")]) == [
        *("beyond_max_rows", "duplicates")
    ]


def test_all_begin_alike() -> None:
    splitter = Splitter(own_eval=False, max_rows=None)
    assert assign(splitter, [("train", "a", "p"), ("train", "b", "p")]) == ["train"] * 2
    assert splitter.has_one_question
    assign(splitter, [("train", "c", "q")])
    assert not splitter.has_one_question


def test_digests_of_earlier_rows_are_a_set() -> None:
    """Against Python's own set, in batches of any size."""
    draw, splitter, seen = random.Random(0), Splitter(own_eval=False, max_rows=None), set[str]()
    for _ in range(50):
        drawn = [str(draw.randrange(3000)) for _ in range(draw.randrange(200))]
        outcomes = assign(splitter, [("train", one, "q") for one in drawn]) if drawn else []
        for one, outcome in zip(drawn, outcomes, strict=True):
            assert outcome == ("duplicates" if one in seen else "train")
            seen.add(one)
