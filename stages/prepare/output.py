"""Outputs of the preparation: Parquet files in row groups, rejected.jsonl, and their counts."""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.prepare.rows import SPLITS, Source
from stages.prepare.splitting import OUTCOMES, draw
from stages.shared.core.errors import UserError

_CALL = pa.struct({"name": pa.string(), "arguments": pa.string(), "id": pa.string()})
_MESSAGE = pa.struct(
    {
        "role": pa.string(),
        "content": pa.string(),
        "reasoning": pa.string(),
        "tool_calls": pa.list_(_CALL),
        "tool_call_id": pa.string(),
        "name": pa.string(),
        "weight": pa.float64(),
    }
)
SCHEMA = pa.schema(
    {
        "conversation_id": pa.string(),
        "messages": pa.list_(_MESSAGE),
        "text": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.bool_()),
        "text_bytes": pa.int64(),
        "answer": pa.string(),
        "language": pa.string(),
        "tools": pa.string(),  # JSON, like the next
        "template_kwargs": pa.string(),
        "source": pa.string(),  # null: there is one
        "turn": pa.int32(),  # the message supervised, where a conversation has several rows
        "weights": pa.list_(pa.float32()),  # null: all supervised tokens weigh 1
    }
)
# Of a row, beside SCHEMA: what row groups and figures need.
FIGURES = {"is_first": pa.bool_(), "supervised_tokens": pa.int64()}
_STORED = pa.schema([*SCHEMA, *(pa.field(*column) for column in FIGURES.items())])
GROUP_ROWS, GROUP_BYTES = 1000, 16 << 20  # of a row group; in memory
_SHOWN = 20  # languages and unknown fields in the metrics
_COUNTED = 1000  # distinct reasons and fields, of which a file may have as many as rows
_FLAGS = ("truncated", "dropped_turns")
_COUNTS = ("conversations", "rows", "tokens", "supervised_tokens")


class RowGroups:
    """Parquet file whose row groups hold whole batches, or `GROUP_ROWS` of a large one."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._waiting: list[pa.Table] = []

    def add(self, rows: pa.Table) -> None:
        """Append rows of `SCHEMA` and `FIGURES`."""
        self._waiting.append(rows)
        if (
            sum(map(len, self._waiting)) >= GROUP_ROWS
            or sum(one.nbytes for one in self._waiting) >= GROUP_BYTES
        ):
            self._write()

    def _write(self) -> None:
        schema = self._writer.schema
        table = pa.concat_tables(self._waiting).select(schema.names).cast(schema)
        self._writer.write_table(table.combine_chunks(), GROUP_ROWS)  # pages follow chunks
        self._waiting = []

    def close(self) -> None:
        """Write the last group and the footer."""
        if self._waiting:
            self._write()
        self._writer.close()


class SplitFile(RowGroups):
    """One split: its Parquet file and its counts."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, SCHEMA)
        self.by_source: dict[str | None, Counter[str]] = {}
        self.languages = Counter[str]()
        self.longest = self.last_id = 0

    def add(self, rows: pa.Table) -> None:
        """Append rows, and count them."""
        if not len(rows):
            return
        super().add(rows)
        lengths, ids = pc.list_value_length(rows["input_ids"]), pc.list_flatten(rows["input_ids"])
        columns = (rows["is_first"].cast(pa.int64()), [1] * len(rows), lengths)
        counts = dict(zip(_COUNTS, (*columns, rows["supervised_tokens"]), strict=True))
        table = pa.table({"source": rows["source"], **counts}).group_by("source")
        for one in table.aggregate([(name, "sum") for name in _COUNTS]).to_pylist():
            count = self.by_source.setdefault(one["source"], Counter())
            count.update({name: one[f"{name}_sum"] for name in _COUNTS})
        self.longest = max(self.longest, pc.max(lengths).as_py())
        self.last_id = max(self.last_id, pc.max(ids).as_py())
        self.languages.update(rows["language"].filter(rows["is_first"]).to_pylist())

    def figures(self) -> dict[str, Any]:
        """Metrics of the split."""
        total = sum(self.by_source.values(), Counter[str]())
        named = sorted((name, count) for name, count in self.by_source.items() if name is not None)
        by_source = {name: _shown(count) for name, count in named}
        return {
            **_shown(total),
            "longest_tokens": self.longest,
            "languages": _most_common(self.languages),
            **({"by_source": by_source} if by_source else {}),
        }


def _shown(count: Counter[str]) -> dict[str, int]:
    """Counts of a split; its rows where a conversation has several."""
    names = [name for name in _COUNTS if name != "rows" or count[name] > count["conversations"]]
    return {name: count[name] for name in names}


class Mixture(RowGroups):
    """Rows of the training split, stored until all are known, then drawn by `prepare.mix`."""

    def __init__(self, path: Path, weights: Mapping[str, float]) -> None:
        super().__init__(path, _STORED)
        self._path, self._weights = path, weights
        # Of each conversation: index of `weights`, and supervised tokens.
        self._sources, self._tokens = [np.empty(0, np.int32)], [np.empty(0, np.int64)]

    def add(self, rows: pa.Table) -> None:
        """Store rows."""
        if not len(rows):
            return
        super().add(rows)
        heads = rows["is_first"].to_numpy()
        sources = pc.index_in(rows["source"], value_set=pa.array([*self._weights]))
        self._sources.append(sources.to_numpy()[heads].astype(np.int32))
        tokens = rows["supervised_tokens"].to_numpy()
        self._tokens.append(np.add.reduceat(tokens, heads.nonzero()[0]))

    def draw(self, file: SplitFile, seed: int, limit: int | None) -> dict[str, Any]:
        """Write the drawn conversations, at most `limit`, in their order; return the metrics."""
        self.close()
        sources, tokens = np.concatenate(self._sources), np.concatenate(self._tokens)
        drawn = draw(tokens, sources, [*self._weights.values()], seed, limit)
        for present, why in (
            (sources, "it has no conversation for training. Set it to 0, or add some."),
            (sources[drawn], "too little for a conversation. Raise it, or prepare.max_rows."),
        ):
            for i, (name, weight) in enumerate(self._weights.items()):
                if weight and i not in present:
                    raise UserError(
                        f"params.yaml: prepare.mix gives {name} the weight {weight}; {why}"
                    )
        begun = 0
        with pq.ParquetFile(self._path) as stored:
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
            for i, (name, weight) in enumerate(self._weights.items())
        }


@dataclass
class Tally:
    """Counts over the conversations of both splits, and rejected.jsonl."""

    file: TextIO
    reasons: Counter[str] = field(default_factory=Counter)  # of rejections
    first: dict[str, str] = field(default_factory=dict)  # place of the first, by reason
    outcomes: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)

    def add(self, source: Source, heads: pa.Table, outcomes: np.ndarray) -> None:
        """Count conversations by their first rows, and unread fields; list the rejected ones."""
        self.outcomes.update(outcomes.tolist())
        accepted = heads.select(["form", *_FLAGS]).filter(np.isin(outcomes, SPLITS))
        for name in _FLAGS:
            self.flags[name] += pc.sum(accepted[name]).as_py() or 0
        self.forms.update(accepted["form"].to_pylist())
        for name in pc.list_flatten(heads["unknown"]).to_pylist():
            _add(self.unknown, name)
        for row in heads.select(["line", "reason"]).filter(outcomes == "rejected").to_pylist():
            reason = row["reason"]
            name, unit, number = source.place(row["line"])
            entry = {"file": name, unit: number, "reason": reason}
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            _add(self.reasons, reason)
            if reason in self.reasons:
                at = f"{name}:{number}" if unit == "line" else f"{name}, row {number}"
                self.first.setdefault(reason, at)

    def tell_unknown(self) -> None:
        """Name the fields that are not read, if any, on stderr."""
        if self.unknown:
            common = self.unknown.most_common(5)
            shown = ", ".join(f"{name} ({number} rows)" for name, number in common)
            print(f"prepare: {len(self.unknown)} fields are not read: {shown}", file=sys.stderr)

    def figures(self) -> dict[str, Any]:
        """Metrics."""
        names = ("rejected", "duplicates", "leaked")
        return {
            "rows_in": sum(self.outcomes[outcome] for outcome in OUTCOMES),
            **{name: self.outcomes[name] for name in names},
            **{name: self.flags[name] for name in _FLAGS},
            "beyond_max_rows": self.outcomes["beyond_max_rows"],
            "unknown_fields": _most_common(self.unknown),
            "forms": _most_common(self.forms),
        }


def _add(counter: Counter[str], name: str) -> None:
    """Count a name, a new one only while there are few."""
    if name in counter or len(counter) < _COUNTED:
        counter[name] += 1


def _most_common(counter: Counter[str]) -> dict[str, int]:
    """The most common names, for the metrics."""
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN])
