"""Raw rows into train and eval: encoded by `datasets` in several processes, split, and written.

A file is encoded a chunk at a time, so that neither memory nor the disk holds more for a longer
file. The bytes that are written do not depend on the number of processes.
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
from tqdm import tqdm

from stages.prepare import forms, limits
from stages.prepare.config import Prepare
from stages.prepare.loss_mask import Example, ExampleEncoder
from stages.prepare.rows import SPLITS, Source, Split, find_sources, parse_line, read_lines
from stages.prepare.splitting import OUTCOMES, Splitter, digest_of, is_held_out
from stages.shared.chat import templates
from stages.shared.chat.conversation import RejectedRow, conversation_id
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core import files, progress

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
# What else is known of a row; where it is rejected, the line and the reason alone.
ENCODED = pa.schema(
    [
        *SCHEMA,
        pa.field("line", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("question", pa.string()),
        pa.field("is_held_out", pa.bool_()),
        pa.field("supervised_tokens", pa.int64()),
        pa.field("truncated", pa.bool_()),
        pa.field("dropped_turns", pa.bool_()),
        pa.field("unknown", pa.list_(pa.string())),
    ]
)
LINES = pa.schema({"line": pa.int64(), "row": pa.binary(), "position": pa.int64()})
CHUNK_BYTES = 4 << 20
BATCH_ROWS = 1000
ROWS_PER_PROCESS = 2000  # at least
_GROUP_ROWS = 1000
_COUNTS = ("rejected", "duplicates", "leaked", "truncated", "dropped_turns", "beyond_max_rows")
_LANGUAGES = _FIELDS = 20  # that are counted by name
_NAMES = 1000  # reasons and fields that are counted at all; a file may have as many as rows


def encode_rows(lines: pa.Table, tokenizer: str, parameters: Prepare) -> pa.Table:
    """Parse, render, encode and mask some lines.

    Args:
        lines: of `LINES`.
        tokenizer: its folder.
        parameters: of the stage.

    Returns:
        Of `ENCODED`, a row for each line that is not blank.
    """
    encoded: list[dict[str, Any]] = []
    conversations: list[forms.Conversation] = []
    parsed: list[dict[str, Any]] = []
    for line, row in zip(lines["line"].to_pylist(), lines["row"].to_pylist(), strict=True):
        if row.strip():
            encoded.append({"line": line})
            try:
                conversations.append(forms.parse(parse_line(row), parameters.format))
                parsed.append(encoded[-1])
            except RejectedRow as reason:
                encoded[-1]["reason"] = _printable(str(reason))
    encoder = _encoder(tokenizer, parameters)
    examples = encoder.encode([conversation.messages for conversation in conversations])
    for row, conversation, one in zip(parsed, conversations, examples, strict=True):
        row["unknown"] = [*map(_printable, conversation.unknown)]
        if isinstance(one, RejectedRow):
            row["reason"] = str(one)
        else:
            row.update(_columns(conversation, one, parameters))
    return pa.Table.from_pylist(encoded, schema=ENCODED)


def _columns(conversation: forms.Conversation, one: Example, parameters: Prepare) -> dict[str, Any]:
    question = conversation.question
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


@lru_cache(maxsize=1)  # in each process; one that is forked has it
def _encoder(folder: str, parameters: Prepare) -> ExampleEncoder:
    tokenizer = load_tokenizer(Path(folder))
    template = templates.make(parameters.template, tokenizer)
    return ExampleEncoder(tokenizer, template, parameters.train_on, parameters.max_length)


def encode_chunks(
    source: Source, cache: Path, bar: "tqdm[Any]", processes: int, **arguments: Any
) -> Iterator[pa.Table]:
    """A file, encoded a chunk at a time.

    Args:
        source: the file.
        cache: an empty folder for the files of `datasets`.
        bar: advanced by the bytes that were read.
        processes: at most so many.
        arguments: of `encode_rows`.

    Yields:
        Tables of `ENCODED`.
    """
    # Here, since the tokenizer's module has switched the hub off by now.
    from datasets import Dataset, Features, disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()
    position, line, size = 0, 1, source.path.stat().st_size
    while position < size:
        lines = Dataset.from_generator(
            read_lines,
            features=Features.from_arrow_schema(LINES),
            cache_dir=str(cache),
            gen_kwargs={
                "path": str(source.path),
                "position": position,
                "line": line,
                "max_bytes": CHUNK_BYTES,
            },
            fingerprint=f"{source.split}{position}",
        )
        workers = min(processes, len(lines) // ROWS_PER_PROCESS)
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
                load_from_cache_file=False,
                new_fingerprint=f"encoded{source.split}{position}",
            )
        yield encoded[:]
        last = lines[-1]
        bar.update(last["position"] - position)
        position, line = last["position"], last["line"] + 1
        shutil.rmtree(cache)
        cache.mkdir()


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
    """Answer Ctrl-C and SIGTERM when the block has ended.

    An exception where `multiprocess` starts or ends processes leaves some of them behind.
    """
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
    """One split: its file and its figures."""

    writer: pq.ParquetWriter
    count: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    last_id: int = 0

    def add(self, rows: pa.Table) -> None:
        """Add rows of `ENCODED`."""
        if not len(rows):
            return
        table = rows.select(SCHEMA.names).cast(SCHEMA).combine_chunks()  # else pages follow them
        self.writer.write_table(table, row_group_size=_GROUP_ROWS)
        lengths = pc.list_value_length(rows["input_ids"])
        self.count["conversations"] += len(rows)
        self.count["tokens"] += pc.sum(lengths).as_py()
        self.count["supervised_tokens"] += pc.sum(rows["supervised_tokens"]).as_py()
        longest = pc.max(lengths).as_py()
        self.count["longest_tokens"] = max(self.count["longest_tokens"], longest)
        last_id = pc.max(pc.list_flatten(rows["input_ids"])).as_py()
        self.last_id = max(self.last_id, last_id)
        self.languages.update(rows["language"].to_pylist())

    def figures(self) -> dict[str, Any]:
        """What describes the split."""
        names = ("conversations", "tokens", "supervised_tokens", "longest_tokens")
        figures = {name: self.count[name] for name in names}
        return figures | {"languages": _most_common(self.languages, _LANGUAGES)}


@dataclass
class Rejections:
    """Rejected rows: in a file of their own, counted by reason."""

    file: TextIO
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, source: Source, rows: pa.Table) -> None:
        """Write down rows of `ENCODED` that have a reason."""
        for line, reason in zip(rows["line"].to_pylist(), rows["reason"].to_pylist(), strict=True):
            name, unit, number = source.place(line)
            entry = {"file": name, unit: number, "reason": reason}
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            if _add(self.reasons, reason):
                at = f"{name}:{number}" if unit == "line" else f"{name}, row {number}"
                self.first.setdefault(reason, at)


def prepare(
    raw: Path,
    tokenizer: Path,
    model: Path | None,
    folder: Path,
    parameters: Prepare,
    processes: int | None = None,
) -> dict[str, Any]:
    """Write both splits, the rejected rows and the format.

    Args:
        raw: what `fetch_data` wrote.
        tokenizer: its folder.
        model: its config.json, whose limits the conversations are held against.
        folder: where to write.
        parameters: of the stage.
        processes: at most so many; None: one a core.

    Returns:
        The metrics.

    Raises:
        UserError: too many rows are rejected, a split is empty, or the model cannot take a row.
    """
    sources = find_sources(raw)
    template = _encoder(str(tokenizer), parameters).template
    own_eval = "eval" in sources
    splitter = Splitter(own_eval, parameters.max_rows)
    processes = processes or len(os.sched_getaffinity(0))
    if processes > 1:  # they share the cores already
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = {"tokenizer": str(tokenizer), "parameters": parameters}
    count, unknown = Counter[str](), Counter[str]()
    with ExitStack() as stack:
        cache = stack.enter_context(_empty_folder(folder / "cache.partial"))
        path = stack.enter_context(files.whole_file(folder / "rejected.jsonl"))
        rejections = Rejections(stack.enter_context(path.open("w", encoding="utf-8")))
        splits = {split: stack.enter_context(_split_file(folder, split)) for split in SPLITS}
        size = sum(source.path.stat().st_size for source in sources.values())
        bar = stack.enter_context(progress.bar(total=size, desc="prepare", unit="B"))
        for split in sorted(sources):  # eval first: it decides what leaks
            for rows in encode_chunks(sources[split], cache, bar, processes, **arguments):
                outcomes = splitter.assign(*_keys(rows, split if own_eval else None))
                for target, file in splits.items():
                    file.add(rows.filter(outcomes == target))
                rejections.add(sources[split], rows.filter(outcomes == "rejected"))
                kept = rows.filter(np.isin(outcomes, SPLITS))
                for name in ("truncated", "dropped_turns"):
                    count[name] += pc.sum(kept[name]).as_py() or 0
                count.update(outcomes.tolist())
                for name in pc.list_flatten(rows["unknown"]).to_pylist():
                    _add(unknown, name)
                if own_eval and splitter.is_full:
                    break
        metrics: dict[str, Any] = {"rows_in": sum(count[outcome] for outcome in OUTCOMES)}
        metrics |= {name: count[name] for name in _COUNTS}
        metrics["unknown_fields"] = _most_common(unknown, _FIELDS)
        metrics |= {split: file.figures() for split, file in splits.items()}
        metrics["template"] = parameters.template
        told = limits.told(rejections.reasons, rejections.first)
        limits.require_rows(parameters, metrics, rejections.reasons, told)
        limits.require_splits(metrics, own_eval, splitter.begins_alike, told)
        if model is not None:
            longest = max(metrics[split]["longest_tokens"] for split in SPLITS)
            limits.require_fit(model, parameters, longest, max(f.last_id for f in splits.values()))
    files.write_json(folder / "format.json", template.format().model_dump())
    if unknown:
        told = ", ".join(f"{name} ({number} rows)" for name, number in unknown.most_common(5))
        print(f"prepare: {len(unknown)} fields are not read: {told}", file=sys.stderr)
    return metrics


def _keys(rows: pa.Table, split: Split | None) -> tuple[np.ndarray, ...]:
    """What `Splitter.assign` goes by; `split` is that of a source that has its own."""
    held_out = pc.fill_null(rows["is_held_out"], False).to_numpy()
    ids, questions = (
        np.array(pc.fill_null(rows[name], "").to_pylist(), "S32")
        for name in ("conversation_id", "question")
    )
    is_eval = held_out if split is None else np.full(len(rows), split == "eval")
    return pc.is_null(rows["reason"]).to_numpy(), is_eval, ids, questions


@contextmanager
def _empty_folder(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def _split_file(folder: Path, split: Split) -> Iterator[SplitFile]:
    with (
        files.whole_file(folder / f"{split}.parquet") as partial,
        pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer,
    ):
        yield SplitFile(writer)


def _add(counter: Counter[str], name: str) -> bool:
    """Count a name, unless there are too many; whether it was."""
    counted = name in counter or len(counter) < _NAMES
    if counted:
        counter[name] += 1
    return counted


def _most_common(counter: Counter[str], count: int) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:count])


def _printable(text: str) -> str:
    """Half surrogate pairs, which no encoding holds, spelled out."""
    return text.encode(errors="backslashreplace").decode()
