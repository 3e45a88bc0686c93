"""Masks and bytes of several texts at once, all expectations by hand."""

import numpy as np

from stages.prepare import masks
from stages.shared.chat.encoded import Encoded, join


def encoded(*spans: tuple[int, int]) -> Encoded:
    starts, ends = np.array(spans, dtype=np.int32).reshape(-1, 2).T
    return Encoded(np.arange(len(spans), dtype=np.int32), starts, ends)


TEXTS = ["two é😀", "is"]
JOINED = join(TEXTS, [encoded((0, 3), (3, 5), (5, 6), (5, 6)), encoded((0, 1), (1, 2))])


def test_the_first_token_of_no_text_is_learnt() -> None:
    whole = [[(0, len(text))] for text in TEXTS]
    assert masks.learnt(JOINED, whole).tolist() == [False, True, True, True, False, True]
    assert masks.learnt(JOINED, [[(4, 5)], []]).tolist() == [False, True] + [False] * 4


def test_a_text_without_tokens_has_nothing_to_learn() -> None:
    joined = join(["is", ""], [encoded((0, 1), (1, 2)), encoded()])
    assert masks.learnt(joined, [[(0, 2)], [(0, 0)]]).tolist() == [False, True]


def test_bytes_are_of_characters_and_each_run_of_tokens_counts_its_own() -> None:
    def count(*which: int) -> list[int]:
        mask = np.zeros(len(JOINED.tokens), dtype=bool)
        mask[list(which)] = True
        return masks.utf8_bytes(JOINED, mask).tolist()

    assert count() == [0, 0]
    assert count(1) == [len(" é".encode()), 0]
    assert count(2) == count(3) == count(2, 3) == [len("😀".encode()), 0]
    assert count(1, 2, 3, 5) == [len(" é😀".encode()), 1]
