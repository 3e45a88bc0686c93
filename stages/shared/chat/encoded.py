"""Tokens and the characters that they stand for: of one text, or of many as if they were one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from stages.shared.chat.templates import Span


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a text.

    Attributes:
        input_ids: int32 [tokens].
        starts: int32 (of many texts int64) [tokens], the first character that each token stands
            for.
        ends: likewise, the character after its last. Tokens leave no gap between them; where
            several share the bytes of one character, each of them stands for it.
    """

    input_ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, which: slice | np.ndarray) -> "Encoded":
        return Encoded(self.input_ids[which], self.starts[which], self.ends[which])

    def holding(self, spans: np.ndarray) -> np.ndarray:
        """Which tokens hold a character of a span.

        Args:
            spans: [spans, 2], in order, none within another.

        Returns:
            Bool [tokens].
        """
        begins = np.append(spans[:, 0], np.iinfo(np.int64).max)
        return begins[spans[:, 1].searchsorted(self.starts, side="right")] < self.ends


@dataclass(frozen=True, slots=True)
class Joined:
    """Texts one behind the other, as one: what is done to all at once is done at array speed.

    Attributes:
        text: the texts.
        begins: int64 [texts + 1], the first character of each, and the end.
        edges: int64 [texts + 1], the first token of each, and the end.
        tokens: of the whole text.
    """

    text: str
    begins: np.ndarray
    edges: np.ndarray
    tokens: Encoded

    def spans(self, spans: Sequence[Sequence[Span]]) -> np.ndarray:
        """Spans of each text as spans of the whole, int64 [spans, 2]."""
        flat = np.array([edge for span in chain.from_iterable(spans) for edge in span], np.int64)
        before = np.repeat(self.begins[:-1], [len(some) for some in spans])
        return flat.reshape(-1, 2) + before[:, None]

    def sums(self, of_tokens: np.ndarray) -> np.ndarray:
        """Sums over the tokens of each text, int64 [texts]."""
        sums = np.append(0, np.cumsum(of_tokens, dtype=np.int64))
        return np.diff(sums[self.edges])


def join(texts: Sequence[str], encoded: Sequence[Encoded]) -> Joined:
    """Put texts, and the tokens of each, one behind the other."""
    begins = np.fromiter(accumulate(map(len, texts), initial=0), np.int64, len(texts) + 1)
    edges = np.fromiter(accumulate(map(len, encoded), initial=0), np.int64, len(texts) + 1)
    nothing = np.empty(0, np.int32)  # so that no text is a text too
    before = np.repeat(begins[:-1], np.diff(edges))
    tokens = Encoded(
        np.concatenate([nothing, *(one.input_ids for one in encoded)]),
        np.concatenate([nothing, *(one.starts for one in encoded)]) + before,
        np.concatenate([nothing, *(one.ends for one in encoded)]) + before,
    )
    return Joined("".join(texts), begins, edges, tokens)
