"""Which characters a byte-level token stands for, from the bytes that it spells.

A tokenizer that is asked for them answers with a pair of Python integers a token, which costs as
much as the tokens themselves. What the tokens of a byte-level vocabulary spell is the text; that
it is so is looked at for every text.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise

import numpy as np
from tokenizers import Tokenizer, decoders
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stages.shared.chat.encoded import Encoded

_NO_TEXT = b"\xff"  # no UTF-8 has this byte


class Spelling:
    """The bytes of each token."""

    def __init__(self, backend: Tokenizer) -> None:
        vocabulary = backend.get_vocab(with_added_tokens=True)
        byte_of = {ord(character): byte for byte, character in bytes_to_unicode().items()}
        pieces = [_NO_TEXT] * (max(vocabulary.values()) + 1)
        for token, number in vocabulary.items():
            pieces[number] = token.translate(byte_of).encode("latin-1", "replace") or _NO_TEXT
        for number, added in backend.get_added_tokens_decoder().items():
            pieces[number] = added.content.encode()
        self._pieces = np.array(pieces, dtype=object)
        self._lengths = np.array([len(piece) for piece in pieces])

    def read(self, ids: Sequence[list[int]], texts: Sequence[str]) -> list[Encoded | None]:
        """Of each text the tokens with their characters; None where they do not spell it."""
        edges = list(accumulate(map(len, ids), initial=0))
        flat = np.fromiter(chain.from_iterable(ids), np.int32, edges[-1])
        spelt = b"".join(self._pieces[flat].tolist())
        at = np.append(0, np.cumsum(self._lengths[flat]))  # where in `spelt` each token begins
        # How many characters have begun before each byte; a byte 10xxxxxx begins none.
        begun = np.append(0, np.cumsum((np.frombuffer(spelt, np.uint8) & 0xC0) != 0x80))
        before = np.repeat(begun[at[edges[:-1]]], np.diff(edges))
        starts = (begun[at[:-1] + 1] - 1 - before).astype(np.int32)
        ends = (begun[at[1:]] - before).astype(np.int32)
        spelt_texts = (spelt[a:b] for a, b in pairwise(at[edges].tolist()))
        return [
            Encoded(flat[a:b], starts[a:b], ends[a:b]) if said == text.encode() else None
            for (a, b), said, text in zip(pairwise(edges), spelt_texts, texts, strict=True)
        ]


def of(backend: Tokenizer) -> Spelling | None:
    """The spelling of a tokenizer, or None where its tokens spell no bytes."""
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    return _of(backend, backend.get_vocab_size(with_added_tokens=True))


@lru_cache(maxsize=2)  # a tokenizer, and its copy for plain text
def _of(backend: Tokenizer, size: int) -> Spelling:
    return Spelling(backend)
