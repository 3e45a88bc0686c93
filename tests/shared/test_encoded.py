"""Tokens and their characters, of one text and of several as one; all expectations by hand."""

import numpy as np

from stages.shared.chat.encoded import Encoded, Joined, join


def encoded(*spans: tuple[int, int]) -> Encoded:
    starts, ends = np.array(spans, dtype=np.int32).reshape(-1, 2).T
    return Encoded(np.arange(len(spans), dtype=np.int32), starts, ends)


def both() -> Joined:
    """Of `two 😀` the last two tokens share a character; `is` is one token."""
    return join(["two 😀", "is"], [encoded((0, 3), (3, 4), (4, 5), (4, 5)), encoded((0, 2))])


def test_a_token_holds_a_character_of_a_span() -> None:
    one = encoded((0, 2), (2, 4), (4, 5), (4, 5), (5, 8))
    held = {
        ((0, 8),): [1, 1, 1, 1, 1],
        ((0, 2),): [1, 0, 0, 0, 0],
        ((1, 3),): [1, 1, 0, 0, 0],
        ((4, 5),): [0, 0, 1, 1, 0],
        ((0, 1), (5, 6)): [1, 0, 0, 0, 1],
        ((8, 9),): [0, 0, 0, 0, 0],
        (): [0, 0, 0, 0, 0],
    }
    for spans, expected in held.items():
        found = one.holding(np.array(spans, dtype=np.int64).reshape(-1, 2))
        assert found.tolist() == [bool(x) for x in expected], spans


def test_texts_one_behind_the_other() -> None:
    joined = both()
    assert joined.text == "two 😀is"
    assert joined.begins.tolist() == [0, 5, 7]
    assert joined.edges.tolist() == [0, 4, 5]
    assert joined.tokens.input_ids.tolist() == [0, 1, 2, 3, 0]
    assert joined.tokens.starts.tolist() == [0, 3, 4, 4, 5]
    assert joined.tokens.ends.tolist() == [3, 4, 5, 5, 7]


def test_what_is_of_each_text_is_of_the_whole() -> None:
    joined = both()
    assert joined.spans([[(0, 3), (4, 5)], [(1, 2)]]).tolist() == [[0, 3], [4, 5], [6, 7]]
    assert joined.spans([[], [(0, 2)]]).tolist() == [[5, 7]]
    assert joined.sums(np.array([True, False, True, True, True])).tolist() == [3, 1]


def test_no_texts_and_texts_without_tokens() -> None:
    nothing = join([], [])
    assert (nothing.text, len(nothing.tokens), nothing.edges.tolist()) == ("", 0, [0])
    assert nothing.sums(np.empty(0, dtype=bool)).tolist() == []
    assert nothing.tokens.holding(nothing.spans([])).tolist() == []
    empty = join(["", "is", ""], [encoded(), encoded((0, 2)), encoded()])
    assert empty.sums(np.array([True])).tolist() == [0, 1, 0]
