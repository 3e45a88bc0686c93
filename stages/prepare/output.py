"""Outputs of the preparation: a Parquet file per split, rejected.jsonl, and their counts."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.prepare.rows import SPLITS, Source
from stages.prepare.splitting import OUTCOMES

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
# Of a row, beside SCHEMA: what the figures need.
FIGURES = {"is_first": pa.bool_(), "supervised_tokens": pa.int64()}
_GROUP_ROWS = 1000
_SHOWN = 20  # languages and unknown fields in the metrics
_COUNTED = 1000  # distinct reasons and fields, of which a file may have as many as rows
_FLAGS = ("truncated", "dropped_turns")
_COUNTS = ("conversations", "rows", "tokens", "supervised_tokens")


@dataclass
class SplitFile:
    """One split: its Parquet file and its counts."""

    writer: pq.ParquetWriter
    count: Counter[str] = field(default_factory=Counter)
    by_source: dict[str, Counter[str]] = field(default_factory=dict)
    languages: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    last_id: int = 0

    def add(self, rows: pa.Table) -> None:
        """Append rows of `SCHEMA` and `FIGURES`."""
        if not len(rows):
            return
        # Combined, since pages follow chunks.
        table = rows.select(SCHEMA.names).cast(SCHEMA).combine_chunks()
        self.writer.write_table(table, row_group_size=_GROUP_ROWS)
        self.count.update(_counts(rows))
        for name in rows["source"].unique().to_pylist():
            if name is not None:
                some = rows.filter(pc.equal(rows["source"], name))
                self.by_source.setdefault(name, Counter()).update(_counts(some))
        lengths, ids = pc.list_value_length(rows["input_ids"]), pc.list_flatten(rows["input_ids"])
        self.longest = max(self.longest, pc.max(lengths).as_py())
        self.last_id = max(self.last_id, pc.max(ids).as_py())
        self.languages.update(rows["language"].filter(rows["is_first"]).to_pylist())

    def figures(self) -> dict[str, Any]:
        """Metrics of the split."""
        by_source = {name: _shown(count) for name, count in sorted(self.by_source.items())}
        return {
            **_shown(self.count),
            "longest_tokens": self.longest,
            "languages": _most_common(self.languages),
            **({"by_source": by_source} if by_source else {}),
        }


def _counts(rows: pa.Table) -> dict[str, int]:
    numbers = (pc.sum(rows["is_first"]).as_py(), len(rows))
    tokens = pc.sum(pc.list_value_length(rows["input_ids"])).as_py()
    return dict(
        zip(_COUNTS, (*numbers, tokens, pc.sum(rows["supervised_tokens"]).as_py()), strict=True)
    )


def _shown(count: Counter[str]) -> dict[str, int]:
    """Counts of a split; its rows where a conversation has several."""
    names = [name for name in _COUNTS if name != "rows" or count[name] > count["conversations"]]
    return {name: count[name] for name in names}


@dataclass
class Tally:
    """Counts over the conversations of both splits."""

    outcomes: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)

    def add(self, heads: pa.Table, outcomes: np.ndarray) -> None:
        """Count conversations by their first rows, and unread fields."""
        self.outcomes.update(outcomes.tolist())
        kept = heads.select(["form", *_FLAGS]).filter(np.isin(outcomes, SPLITS))
        for name in _FLAGS:
            self.flags[name] += pc.sum(kept[name]).as_py() or 0
        self.forms.update(kept["form"].to_pylist())
        for name in pc.list_flatten(heads["unknown"]).to_pylist():
            _add(self.unknown, name)

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


@dataclass
class Rejections:
    """Rejected rows: rejected.jsonl, and counts by reason."""

    file: TextIO
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, source: Source, rows: pa.Table) -> None:
        """Append rows that have a `line` and a `reason`."""
        for line, reason in zip(rows["line"].to_pylist(), rows["reason"].to_pylist(), strict=True):
            name, unit, number = source.place(line)
            entry = {"file": name, unit: number, "reason": reason}
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            _add(self.reasons, reason)
            if reason in self.reasons:
                at = f"{name}:{number}" if unit == "line" else f"{name}, row {number}"
                self.first.setdefault(reason, at)


def _add(counter: Counter[str], name: str) -> None:
    """Count a name, a new one only while there are few."""
    if name in counter or len(counter) < _COUNTED:
        counter[name] += 1


def _most_common(counter: Counter[str]) -> dict[str, int]:
    """The most common names, for the metrics."""
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN])
