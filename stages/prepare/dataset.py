"""Train and eval Parquet files of raw rows: encoded by `datasets`, split, written.

Chunks bound memory and disk; the bytes written do not depend on the number of processes.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.prepare import limits
from stages.prepare.config import Prepare
from stages.prepare.forms import parse
from stages.prepare.loss_mask import Example, ExampleEncoder
from stages.prepare.rows import (
    SPLITS,
    Source,
    Split,
    find_sources,
    parse_line,
    read_lines,
    require_length,
)
from stages.prepare.splitting import OUTCOMES, Splitter, digest_of, is_held_out
from stages.shared.chat import templates
from stages.shared.chat.conversation import Conversation, RejectedRow, conversation_id
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core import files, progress
from stages.shared.core.display import visible

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
ENCODED = pa.schema(
    {
        **{column.name: column.type for column in SCHEMA},
        "line": pa.int64(),
        "reason": pa.string(),  # of the rejection; other columns are null then
        "question": pa.string(),  # a digest
        "is_held_out": pa.bool_(),
        "supervised_tokens": pa.int64(),
        "truncated": pa.bool_(),
        "dropped_turns": pa.bool_(),
        "unknown": pa.list_(pa.string()),
    }
)
LINES = pa.schema({"line": pa.int64(), "row": pa.binary(), "position": pa.int64()})
CHUNK_BYTES = 8 << 20
BYTES_PER_PROCESS = 1 << 20  # at least
BATCH_ROWS = 1000
_GROUP_ROWS = 1000
_SHOWN = 20  # languages and unknown fields in the metrics
_COUNTED = 1000  # distinct reasons and fields, of which a file may have as many as rows


def encode_rows(lines: pa.Table, tokenizer: str, parameters: Prepare) -> pa.Table:
    """Parse, render and encode a table of `LINES`: of `ENCODED`, a row per non-blank line."""
    rows: list[dict[str, Any]] = []
    parsed: list[tuple[dict[str, Any], Conversation]] = []
    for line, row in zip(lines["line"].to_pylist(), lines["row"].to_pylist(), strict=True):
        if row.strip():
            rows.append({"line": line})
            try:
                require_length(row, parameters.max_row_bytes)
                parsed.append((rows[-1], parse(parse_line(row), parameters.format)))
            except RejectedRow as reason:
                rows[-1]["reason"] = visible(str(reason))
    encoder = _encoder(tokenizer, parameters)
    examples = encoder.encode_conversations([conversation for _, conversation in parsed])
    for (columns, conversation), one in zip(parsed, examples, strict=True):
        columns["unknown"] = [*map(visible, conversation.unknown)]
        if isinstance(one, RejectedRow):
            columns["reason"] = visible(str(one))
        else:
            columns.update(_columns(conversation, one[0], parameters))
    return pa.Table.from_pylist(rows, schema=ENCODED)


def _columns(conversation: Conversation, one: Example, parameters: Prepare) -> dict[str, Any]:
    question = next(m["content"] for m in conversation.messages if m["role"] == "user")
    return {
        "conversation_id": conversation_id(one.messages),
        "messages": one.messages,
        "text": one.text,
        "input_ids": one.input_ids,
        "loss_mask": one.loss_mask,
        "text_bytes": one.text_bytes,
        "answer": conversation.answer if one.answered else None,
        "language": conversation.language,
        "question": digest_of(question),
        "is_held_out": is_held_out(question, parameters.eval_fraction, parameters.seed),
        "supervised_tokens": one.supervised_tokens,
        "truncated": one.truncated,
        "dropped_turns": conversation.dropped_turn,
    }


@lru_cache(maxsize=1)  # forked processes inherit it
def _encoder(folder: str, parameters: Prepare) -> ExampleEncoder:
    tokenizer = load_tokenizer(Path(folder))
    template = templates.make(parameters.template, tokenizer)
    return ExampleEncoder(tokenizer, template, parameters.train_on, parameters.max_length)


def encode_chunks(
    source: Source, cache: Path, processes: int, **arguments: Any
) -> Iterator[tuple[pa.Table, int]]:
    """Encode a file chunk by chunk: a table of `ENCODED` and the bytes read for it, each time."""
    # Imported late: the tokenizer's module must switch the hub off first.
    from datasets import Dataset, Features, disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()
    start = {"position": 0, "line": 1}
    while start["position"] < source.path.stat().st_size:
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
        lines = Dataset.from_generator(
            read_lines,
            features=Features.from_arrow_schema(LINES),
            cache_dir=str(cache),
            gen_kwargs={
                "path": str(source.path),
                "max_bytes": CHUNK_BYTES,
                "max_row_bytes": arguments["parameters"].max_row_bytes,
                **start,
            },
            fingerprint="lines",
        )
        last, before = lines[-1], start["position"]
        start = {"position": last["position"], "line": last["line"] + 1}
        workers = min(processes, (last["position"] - before) // BYTES_PER_PROCESS)
        with _signals_deferred() if workers > 1 else nullcontext():
            encoded = lines.with_format("arrow").map(
                encode_rows,
                batched=True,
                batch_size=BATCH_ROWS,
                features=Features.from_arrow_schema(ENCODED),
                remove_columns=LINES.names,
                fn_kwargs=arguments,
                num_proc=workers if workers > 1 else None,
                cache_file_name=str(cache / "encoded.arrow"),
                new_fingerprint="encoded",
            )
        yield encoded[:], last["position"] - before


_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_prctl = ctypes.CDLL(None).prctl
_deferring = False


def _end_with_the_parent() -> None:
    if _deferring:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


os.register_at_fork(after_in_child=_end_with_the_parent)


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM: an exception while `multiprocess` forks or joins leaves orphans."""
    global _deferring  # noqa: PLW0603  (a fork has no other way to know)
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda got, _: caught.append(got)) for number in numbers]
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


@dataclass
class SplitFile:
    """One split: its Parquet file and its counts."""

    writer: pq.ParquetWriter
    count: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    last_id: int = 0

    def add(self, rows: pa.Table) -> None:
        """Append rows of `ENCODED`."""
        if not len(rows):
            return
        # Combined, since pages follow chunks.
        table = rows.select(SCHEMA.names).cast(SCHEMA).combine_chunks()
        self.writer.write_table(table, row_group_size=_GROUP_ROWS)
        lengths, ids = pc.list_value_length(rows["input_ids"]), pc.list_flatten(rows["input_ids"])
        self.count["conversations"] += len(rows)
        self.count["tokens"] += len(ids)
        self.count["supervised_tokens"] += pc.sum(rows["supervised_tokens"]).as_py()
        self.longest = max(self.longest, pc.max(lengths).as_py())
        self.last_id = max(self.last_id, pc.max(ids).as_py())
        self.languages.update(rows["language"].to_pylist())

    def figures(self) -> dict[str, Any]:
        """Metrics of the split."""
        names = ("conversations", "tokens", "supervised_tokens")
        return {
            **{name: self.count[name] for name in names},
            "longest_tokens": self.longest,
            "languages": _most_common(self.languages),
        }


@dataclass
class Rejections:
    """Rejected rows: rejected.jsonl, and counts by reason."""

    file: TextIO
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, source: Source, rows: pa.Table) -> None:
        """Append rows of `ENCODED` that have a reason."""
        for line, reason in zip(rows["line"].to_pylist(), rows["reason"].to_pylist(), strict=True):
            name, unit, number = source.place(line)
            entry = {"file": name, unit: number, "reason": reason}
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            _add(self.reasons, reason)
            if reason in self.reasons:
                at = f"{name}:{number}" if unit == "line" else f"{name}, row {number}"
                self.first.setdefault(reason, at)


def prepare(
    raw: Path,
    tokenizer: Path,
    model: Path | None,  # config.json, for its limits
    folder: Path,
    parameters: Prepare,
    processes: int | None = None,  # one per core
) -> dict[str, Any]:
    """Write both splits, rejected.jsonl and format.json to `folder`; return the metrics."""
    sources = find_sources(raw)
    template = _encoder(str(tokenizer), parameters).template
    splitter = Splitter("eval" in sources, parameters.max_rows)
    processes = processes or len(os.sched_getaffinity(0))
    count, unknown = Counter[str](), Counter[str]()
    with ExitStack() as stack:
        cache = folder / "cache.partial"
        stack.callback(shutil.rmtree, cache, ignore_errors=True)
        path = stack.enter_context(files.whole_file(folder / "rejected.jsonl"))
        rejections = Rejections(stack.enter_context(path.open("w", encoding="utf-8")))
        splits = dict[Split, SplitFile]()
        for split in SPLITS:
            partial = stack.enter_context(files.whole_file(folder / f"{split}.parquet"))
            writer = pq.ParquetWriter(partial, SCHEMA, compression="zstd")
            splits[split] = SplitFile(stack.enter_context(writer))
        size = sum(source.path.stat().st_size for source in sources.values())
        bar = stack.enter_context(progress.bar(total=size, desc="prepare", unit="B"))
        arguments = {"tokenizer": str(tokenizer), "parameters": parameters}
        for split in sorted(sources):  # eval first: it decides what leaks
            for rows, read_bytes in encode_chunks(sources[split], cache, processes, **arguments):
                outcomes = _assign(splitter, rows, split)
                for target, file in splits.items():
                    file.add(rows.filter(outcomes == target))
                rejections.add(sources[split], rows.filter(outcomes == "rejected"))
                count.update(outcomes.tolist())
                kept = rows.filter(np.isin(outcomes, SPLITS))
                for name in ("truncated", "dropped_turns"):
                    count[name] += pc.sum(kept[name]).as_py() or 0
                for name in pc.list_flatten(rows["unknown"]).to_pylist():
                    _add(unknown, name)
                bar.update(read_bytes)
                if splitter.own_eval and splitter.is_full:
                    break
        bar.close()
        names = ("rejected", "duplicates", "leaked", "truncated", "dropped_turns")
        metrics: dict[str, Any] = {
            "rows_in": sum(count[outcome] for outcome in OUTCOMES),
            **{name: count[name] for name in (*names, "beyond_max_rows")},
            "unknown_fields": _most_common(unknown),
            **{str(split): file.figures() for split, file in splits.items()},
            "template": parameters.template,
        }
        limits.require_rows(parameters, metrics, rejections.reasons, rejections.first)
        limits.require_splits(metrics, splitter)
        if model is not None:
            longest = max(file.longest for file in splits.values())
            limits.require_fit(model, parameters, longest, max(f.last_id for f in splits.values()))
    files.write_json(folder / "format.json", template.format().model_dump())
    if unknown:
        shown = ", ".join(f"{name} ({number} rows)" for name, number in unknown.most_common(5))
        print(f"prepare: {len(unknown)} fields are not read: {shown}", file=sys.stderr)
    return metrics


def _assign(splitter: Splitter, rows: pa.Table, split: Split) -> np.ndarray:
    is_eval = pc.fill_null(rows["is_held_out"], False).to_numpy()
    if splitter.own_eval:
        is_eval = np.full(len(rows), split == "eval")
    columns = (pc.fill_null(rows[name], "") for name in ("conversation_id", "question"))
    ids, questions = (np.array(column.to_pylist(), "S32") for column in columns)
    return splitter.assign(pc.is_null(rows["reason"]).to_numpy(), is_eval, ids, questions)


def _add(counter: Counter[str], name: str) -> None:
    if name in counter or len(counter) < _COUNTED:
        counter[name] += 1


def _most_common(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN])
