"""Splitter into train and eval; finds duplicates and leaks."""

import hashlib
from dataclasses import dataclass, field

import numpy as np

OUTCOMES = ("rejected", "leaked", "duplicates", "beyond_max_rows", "eval", "train")
_NONE = np.empty(0, "S32")


@dataclass
class Splitter:
    """Splits by the first user message, so that no prompt is in both splits."""

    own_eval: bool  # a source has an eval file: train rows that begin like a row of eval leak
    max_rows: int | None  # of train, the first ones
    _train_rows: int = 0
    _seen: np.ndarray = field(default_factory=_NONE.copy)  # sorted digests, like the next two
    _held_out: np.ndarray = field(default_factory=_NONE.copy)
    _questions: np.ndarray = field(default_factory=_NONE.copy)  # at most two

    @property
    def is_full(self) -> bool:
        """Whether train has `max_rows` conversations."""
        return self.max_rows is not None and self._train_rows >= self.max_rows

    @property
    def begins_alike(self) -> bool:
        """Whether all conversations have the same first message."""
        return len(self._questions) == 1

    def assign(
        self, usable: np.ndarray, is_eval: np.ndarray, ids: np.ndarray, questions: np.ndarray
    ) -> np.ndarray:
        """Assign the next rows to `OUTCOMES`, str [rows]; flags are bool, digests S32 [rows]."""
        if self.own_eval:  # else the first message alone decides, and none leaks
            self._held_out = _insert(self._held_out, questions[usable & is_eval])
        leaked = usable & ~is_eval & _contains(self._held_out, questions)
        candidates = (usable & ~leaked).nonzero()[0]
        _, first = np.unique(ids[candidates], return_index=True)
        first = candidates[first]
        new = np.zeros(len(ids), bool)
        new[first[~_contains(self._seen, ids[first])]] = True
        self._seen = _insert(self._seen, ids[new])
        self._questions = _insert(self._questions, questions[new])[:2]
        train = new & ~is_eval
        limit = len(ids) if self.max_rows is None else self.max_rows - self._train_rows
        beyond = train & (np.cumsum(train) > limit)
        self._train_rows += int((train & ~beyond).sum())
        return np.select([~usable, leaked, ~new, beyond, is_eval], OUTCOMES[:-1], OUTCOMES[-1])


def is_held_out(question: str, fraction: float, seed: int) -> bool:
    """Whether conversations with this first message are held out."""
    digest = hashlib.sha256(f"{seed}\0{question}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < fraction


def digest_of(question: str) -> str:
    """SHA-256 of a message, cut to 32 hex digits."""
    return hashlib.sha256(question.encode()).hexdigest()[:32]


def _contains(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    if not len(known):
        return np.zeros(len(values), bool)
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values


def _insert(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    values = np.unique(values)
    values = values[~_contains(known, values)]
    return np.insert(known, np.searchsorted(known, values), values)
