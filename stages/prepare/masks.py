"""Which tokens are learnt, and how much text they are: of a whole batch at once."""

from collections.abc import Sequence

import numpy as np

from stages.shared.chat.encoded import Joined
from stages.shared.chat.templates import Span


def learnt(
    joined: Joined, spans: Sequence[Sequence[Span]], excluded: Sequence[Sequence[Span]] = ()
) -> np.ndarray:
    """Which tokens hold a character of what is learnt, bool [tokens].

    Args:
        joined: the tokens of a batch.
        spans: of each text what is learnt of it. Its first token never is: nothing predicts it.
        excluded: of each text what is not, even where a token holds both.
    """
    mask = joined.tokens.holding(joined.spans(spans))
    if any(excluded):
        mask &= ~joined.tokens.holding(joined.spans(excluded))
    firsts = joined.edges[:-1]
    mask[firsts[firsts < len(mask)]] = False  # a last text may have no tokens at all
    return mask


def utf8_bytes(joined: Joined, which: np.ndarray) -> np.ndarray:
    """Of each text the bytes of the characters that some of its tokens stand for.

    Args:
        joined: the tokens of a batch.
        which: bool [tokens], never the first of a text, so that no two texts run together.

    Returns:
        int64 [texts].
    """
    edges = np.diff(which, prepend=False, append=False).nonzero()[0]
    firsts, lasts = edges[::2], edges[1::2] - 1  # of each run of such tokens
    codes = np.frombuffer(joined.text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    before = np.append(0, np.cumsum(widths))
    of_runs = np.zeros(len(which), np.int64)
    of_runs[firsts] = before[joined.tokens.ends[lasts]] - before[joined.tokens.starts[firsts]]
    return joined.sums(of_runs)
