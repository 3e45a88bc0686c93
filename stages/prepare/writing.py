"""What is written: conversations, rows that could not be used, and figures."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from stages.prepare.loss_mask import Example
from stages.prepare.sources import Source
from stages.shared.core import files

SCHEMA = pa.schema(
    {
        "conversation_id": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "text": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.bool_()),
        "text_bytes": pa.int64(),
        "answer": pa.string(),
        "language": pa.string(),
    }
)
_ROWS = 1000  # a row group
_LANGUAGES = 20  # that are counted by name
_REASONS = 1000  # that are counted; a reason may quote its row


@dataclass
class SplitFile:
    """One split: its conversations, a row group at a time, and their figures."""

    writer: pq.ParquetWriter
    conversations: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest_tokens: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, identifier: str, one: Example, answer: str | None, language: str) -> None:
        """Add a conversation, known by the hash of its messages."""
        self._rows.append(
            {
                "conversation_id": identifier,
                "messages": one.messages,
                "text": one.text,
                "input_ids": one.input_ids,
                "loss_mask": one.loss_mask,
                "text_bytes": one.text_bytes,
                "answer": answer,
                "language": language,
            }
        )
        self.conversations += 1
        self.tokens += len(one.input_ids)
        self.supervised_tokens += one.supervised_tokens
        self.longest_tokens = max(self.longest_tokens, len(one.input_ids))
        self.languages[language] += 1
        if len(self._rows) == _ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self._rows:
            self.writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
            self._rows.clear()

    def figures(self) -> dict[str, Any]:
        """What describes the split."""
        by_count = sorted(self.languages.items(), key=lambda item: (-item[1], item[0]))
        return {
            "conversations": self.conversations,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "longest_tokens": self.longest_tokens,
            "languages": dict(by_count[:_LANGUAGES]),
        }


@contextmanager
def split_file(path: Path) -> Iterator[SplitFile]:
    """A parquet file of conversations, whole or not there."""
    with (
        files.whole_file(path) as partial,
        pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer,
    ):
        opened = SplitFile(writer)
        yield opened
        opened.flush()


@dataclass
class Rejections:
    """Rows that could not be used: in a file of their own, counted by reason."""

    file: TextIO
    first: str = ""
    count: int = 0
    _reasons: Counter[str] = field(default_factory=Counter)

    def add(self, source: Source, line: int, reason: str) -> None:
        """Write down a row."""
        file, unit, number = source.place(line)
        entry = {"file": file, unit: number, "reason": reason}
        written = json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace").decode()
        self.file.write(written + "\n")
        self.first = self.first or f"{file}, {unit} {number}: {reason}"
        self.count += 1
        if reason in self._reasons or len(self._reasons) < _REASONS:
            self._reasons[reason] += 1

    def commonest(self) -> str:
        """The three reasons that are met most often, and how often."""
        return ", ".join(f"{reason} ({count})" for reason, count in self._reasons.most_common(3))


@contextmanager
def rejections(path: Path) -> Iterator[Rejections]:
    """A .jsonl file of rejected rows, whole or not there."""
    with files.whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        yield Rejections(file)
