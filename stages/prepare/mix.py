"""Mixture of sources: conversations drawn so that supervised tokens have given shares."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.prepare.config import Prepare
from stages.prepare.output import FIGURES, SCHEMA, SplitFile
from stages.shared.core.errors import UserError

_STORED = pa.schema([*SCHEMA, *(pa.field(*column) for column in FIGURES.items())])


@dataclass
class Mixture:
    """Rows of the training split, stored until all are known, then drawn by `prepare.mix`."""

    path: Path
    weights: Mapping[str, float]
    _sources: list[np.ndarray] = field(default_factory=list)  # index of `weights`, a conversation
    _tokens: list[np.ndarray] = field(default_factory=list)  # supervised, of a conversation

    def __post_init__(self) -> None:
        self._writer = pq.ParquetWriter(self.path, _STORED, compression="zstd")

    def add(self, rows: pa.Table) -> None:
        """Store rows of `SCHEMA` and `FIGURES`."""
        if not len(rows):
            return
        self._writer.write_table(rows.select(_STORED.names).cast(_STORED), row_group_size=1000)
        heads = rows["is_first"].to_numpy()
        names = pa.array([*self.weights])
        sources = pc.index_in(rows["source"].combine_chunks(), value_set=names)
        self._sources.append(sources.to_numpy(zero_copy_only=False)[heads].astype(np.int32))
        tokens = rows["supervised_tokens"].to_numpy()
        self._tokens.append(np.add.reduceat(tokens, heads.nonzero()[0]))

    def draw(self, file: SplitFile, parameters: Prepare) -> dict[str, Any]:
        """Write the drawn conversations, at most `max_rows`, in their order; the metrics."""
        self._writer.close()
        sources = np.concatenate([*self._sources, np.empty(0, np.int32)])
        tokens = np.concatenate([*self._tokens, np.empty(0, np.int64)])
        for i, (name, weight) in enumerate(self.weights.items()):
            if weight and not (sources == i).any():
                raise UserError(
                    f"params.yaml: prepare.mix gives {name} the weight {weight}; it has no "
                    "conversation for training. Set it to 0, or add some."
                )
        weights, limit = [*self.weights.values()], parameters.max_rows
        drawn = draw(tokens, sources, weights, parameters.seed, limit)
        begun = 0
        with pq.ParquetFile(self.path) as stored:
            for group in range(stored.num_row_groups):
                rows = stored.read_row_group(group, use_threads=False)
                conversations = begun + np.cumsum(rows["is_first"].to_numpy()) - 1
                begun = int(conversations[-1]) + 1
                file.add(rows.filter(pa.array(drawn[conversations])))
        return {
            name: {
                "weight": weight,
                "share": float(tokens[drawn & (sources == i)].sum() / tokens[drawn].sum()),
                "conversations": int((drawn & (sources == i)).sum()),
                "of": int((sources == i).sum()),
            }
            for i, (name, weight) in enumerate(self.weights.items())
        }


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
