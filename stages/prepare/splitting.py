"""Which split a conversation belongs to, and which conversations are there already."""

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from stages.prepare.digests import DigestSet

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


@dataclass
class Splitter:
    """Holds out by the first message, so that no prompt stands in both splits.

    Only digests are kept, whatever the conversations weigh.

    Attributes:
        fraction: of the first messages that are held out; None where the source has its own split
            for that.
        seed: which ones.
    """

    fraction: float | None
    seed: int
    _seen: DigestSet = field(default_factory=DigestSet)
    _held_out: DigestSet = field(default_factory=DigestSet)

    def split_of(self, source: Split, question: str) -> Split:
        """Where a conversation goes, by the file it comes from and its first message."""
        if self.fraction is None:
            return source
        draw = int.from_bytes(_hash(f"{self.seed}\0{question}")[:8]) / 2**64
        return "eval" if draw < self.fraction else "train"

    def is_duplicate(self, conversation_id: str) -> bool:
        """Whether this very conversation was seen before; it is from now on."""
        return not self._seen.add(bytes.fromhex(conversation_id))

    def hold_out(self, question: str) -> None:
        """Remember the first message of a held-out conversation.

        Where the first message decides the split, no other split can hold it.
        """
        if self.fraction is None:
            self._held_out.add(_hash(question))

    def leaks(self, question: str) -> bool:
        """Whether a held-out conversation begins with this message too."""
        return len(self._held_out) > 0 and _hash(question) in self._held_out


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
