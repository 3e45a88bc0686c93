"""Train and eval splits: duplicates and leaks, and the mixture of sources that is drawn."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from stages.shared.core.errors import UserError

OUTCOMES = ("rejected", "leaked", "duplicates", "beyond_max_rows", "eval", "train")


class Digests:
    """Set of digests, 16 bytes each: sorted arrays, each more than twice as long as the next."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, digests: np.ndarray) -> None:
        """Add digests, S16 [digests]."""
        self._runs.append(np.unique(digests))
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.union1d(*self._runs[-2:])]

    def hold(self, digests: np.ndarray) -> np.ndarray:
        """Whether each of the digests, S16 [digests], was added, bool [digests]."""
        held = np.zeros(len(digests), bool)
        for run in filter(len, self._runs):
            held |= run[np.minimum(np.searchsorted(run, digests), len(run) - 1)] == digests
        return held


@dataclass
class Splitter:
    """Splits by the first user message, so that no prompt is in both splits."""

    own_eval: bool  # a source has an eval file: train rows that begin like a row of eval leak
    max_rows: int | None  # of train, the first ones
    _train_rows: int = 0
    _seen: Digests = field(default_factory=Digests)
    _held_out: Digests = field(default_factory=Digests)
    _questions: set[bytes] = field(default_factory=set)  # until there are two

    @property
    def is_full(self) -> bool:
        """Whether train has `max_rows` conversations."""
        return self.max_rows is not None and self._train_rows >= self.max_rows

    @property
    def has_one_question(self) -> bool:
        """Whether all conversations have the same first message."""
        return len(self._questions) == 1

    def assign(
        self, usable: np.ndarray, is_eval: np.ndarray, ids: np.ndarray, questions: np.ndarray
    ) -> np.ndarray:
        """Assign the next rows to `OUTCOMES`, str [rows]; flags are bool, digests S16 [rows]."""
        if self.own_eval:  # else the first message alone decides, and none leaks
            self._held_out.add(questions[usable & is_eval])
        leaked = usable & ~is_eval & self._held_out.hold(questions)
        candidates = (usable & ~leaked).nonzero()[0]
        _, first = np.unique(ids[candidates], return_index=True)
        first = candidates[first]
        new = np.zeros(len(ids), bool)
        new[first[~self._seen.hold(ids[first])]] = True
        self._seen.add(ids[new])
        if len(self._questions) < 2:
            self._questions.update(np.unique(questions[new])[:2].tolist())
        train = new & ~is_eval
        limit = len(ids) if self.max_rows is None else self.max_rows - self._train_rows
        beyond = train & (np.cumsum(train) > limit)
        self._train_rows += int((train & ~beyond).sum())
        return np.select([~usable, leaked, ~new, beyond, is_eval], OUTCOMES[:-1], OUTCOMES[-1])


def is_held_out(question: str, fraction: float, seed: int) -> bool:
    """Whether conversations with this first message are held out."""
    digest = hashlib.sha256(f"{seed}\0{question}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < fraction


def digest_of(question: str) -> bytes:
    """SHA-256 of a message, cut to 16 bytes."""
    return hashlib.sha256(question.encode()).digest()[:16]


def draw(
    tokens: np.ndarray, sources: np.ndarray, weights: list[float], seed: int, limit: int | None
) -> np.ndarray:
    """Conversations in which sources have shares of `tokens` like `weights`, bool [conversations].

    None is drawn twice: as many as the scarcest source allows, at random by `seed`. A share is
    exact to half a conversation. `sources` are indices of `weights`, int [conversations].
    """
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(np.flatnonzero(sources == i)) for i in range(len(weights))]
    # A conversation belongs to a share that reaches its middle.
    middles = [np.cumsum(tokens[order]) - tokens[order] / 2 for order in orders]
    totals = [tokens[o].sum() / w for o, w in zip(orders, weights, strict=True) if w]

    def counts(total: float) -> list[int]:
        pairs = zip(middles, weights, strict=True)
        return [int(np.searchsorted(middle, weight * total)) for middle, weight in pairs]

    low, high = 0.0, min(totals)
    if limit is not None and sum(counts(high)) > limit:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(counts(middle)) <= limit else (low, middle)
        high = low
    drawn = np.zeros(len(tokens), bool)
    for order, count in zip(orders, counts(high), strict=True):
        drawn[order[:count]] = True
    return drawn


def require_sources(weights: Mapping[str, float] | None, names: Collection[str | None]) -> None:
    """Refuse a mixture whose names are not those of the sources of the training split."""
    if weights is None:
        return
    known = sorted(name for name in names if name is not None)
    if not known:
        raise UserError(
            f"params.yaml: prepare.mix is {dict(weights)}, but data.path is one source. Set it to "
            "null, or make data.path a folder with a file or a folder for each source."
        )
    if sorted(weights) != known or not any(weights.values()):
        raise UserError(
            f"params.yaml: prepare.mix is {dict(weights)}; the sources are {', '.join(known)}. "
            "Give each a weight; 0 leaves one out."
        )
