"""Train and eval Parquet files of raw rows: encoded by `datasets`, split, written.

Chunks bound memory and disk; the bytes written do not depend on the number of processes.
"""

import ctypes
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.prepare import limits, mix
from stages.prepare.config import Prepare
from stages.prepare.forms import parse
from stages.prepare.loss_mask import Example, ExampleEncoder
from stages.prepare.mix import Mixture
from stages.prepare.output import FIGURES, SCHEMA, Rejections, SplitFile, Tally
from stages.prepare.rows import (
    SPLITS,
    Source,
    Split,
    find_sources,
    parse_line,
    read_lines,
    require_length,
)
from stages.prepare.splitting import Splitter, digest_of, is_held_out
from stages.shared.chat import templates
from stages.shared.chat.conversation import (
    Conversation,
    RejectedRow,
    conversation_id,
    dump,
    to_columns,
)
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core import files, progress, watcher
from stages.shared.core.display import visible

ENCODED = pa.schema(
    {
        **{column.name: column.type for column in SCHEMA},
        **FIGURES,
        "line": pa.int64(),
        "reason": pa.string(),  # of the rejection; other columns are null then
        "question": pa.string(),  # a digest
        "is_held_out": pa.bool_(),
        "truncated": pa.bool_(),
        "dropped_turns": pa.bool_(),
        "unknown": pa.list_(pa.string()),
        "form": pa.string(),
    }
)
LINES = pa.schema({"line": pa.int64(), "row": pa.binary(), "position": pa.int64()})
CHUNK_BYTES = 8 << 20
BYTES_PER_PROCESS = 1 << 20  # at least
BATCH_ROWS = 1000


def encode_rows(lines: pa.Table, tokenizer: str, parameters: Prepare) -> pa.Table:
    """Parse, render and encode a table of `LINES`: of `ENCODED`, rows for each non-blank line."""
    encoder = _encoder(tokenizer, parameters)
    pairs = zip(lines["line"].to_pylist(), lines["row"].to_pylist(), strict=True)
    parsed = {line: _parse(row, parameters) for line, row in pairs if row.strip()}
    conversations = [one for one in parsed.values() if isinstance(one, Conversation)]
    encoded = iter(encoder.encode_conversations(conversations))
    rows: list[dict[str, Any]] = []
    for line, one in parsed.items():
        columns: dict[str, Any] = {"line": line, "is_first": True}
        result = one if isinstance(one, RejectedRow) else next(encoded)
        if isinstance(one, Conversation):
            columns["unknown"] = [*map(visible, one.unknown)]
            columns["form"] = one.form
        if isinstance(result, RejectedRow):
            rows.append({**columns, "reason": visible(str(result))})
            continue
        assert isinstance(one, Conversation)
        for example in _columns(one, result, parameters):
            rows.append(example | columns)
            columns = {"line": line, "is_first": False}
    return pa.Table.from_pylist(rows, schema=ENCODED)


def _parse(row: bytes, parameters: Prepare) -> Conversation | RejectedRow:
    try:
        require_length(row, parameters.max_row_bytes)
        return parse(parse_line(row), parameters.format, parameters.columns)
    except RejectedRow as reason:
        return reason.with_traceback(None)  # whose frames would hold the batch
    except RecursionError:
        return RejectedRow("nested too deeply")


def _columns(
    conversation: Conversation, examples: list[Example], parameters: Prepare
) -> Iterator[dict[str, Any]]:
    """Columns of each of a conversation's examples; the last holds all its messages."""
    kept, tools, kwargs = examples[-1], conversation.tools, conversation.template_kwargs
    context = {"tools": tools, "template_kwargs": kwargs, "text": conversation.text}
    question = conversation.text or next(m["content"] for m in kept.messages if m["role"] == "user")
    shared = {
        "conversation_id": conversation_id(kept.messages, **context),
        "language": conversation.language,
        "tools": dump(tools) if tools else None,
        "template_kwargs": dump(kwargs) if kwargs else None,
        "question": digest_of(question),
        "is_held_out": is_held_out(question, parameters.eval_fraction, parameters.seed),
        "truncated": any(one.truncated for one in examples),
        "dropped_turns": conversation.dropped_turn,
    }
    for one in examples:
        yield {
            **shared,
            "messages": to_columns(one.messages),
            "text": one.text,
            "input_ids": one.input_ids,
            "loss_mask": one.loss_mask,
            "text_bytes": one.text_bytes,
            "answer": conversation.answer if one is kept and one.answered else None,
            "turn": one.turn,
            "weights": one.weights,
            "supervised_tokens": one.supervised_tokens,
        }


@lru_cache(maxsize=1)  # forked processes inherit it
def _encoder(folder: str, parameters: Prepare) -> ExampleEncoder:
    tokenizer = load_tokenizer(Path(folder))
    template = templates.make(parameters.template, tokenizer, parameters.template_name)
    return ExampleEncoder(
        tokenizer,
        template,
        parameters.train_on,
        parameters.max_length,
        parameters.thinking,
        merge_system=parameters.system == "merge",
    )


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
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


os.register_at_fork(after_in_child=_end_with_the_parent)


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Defer signals: an exception while `multiprocess` forks or joins leaves orphans."""
    global _deferring  # noqa: PLW0603  (a fork has no other way to know)
    caught: list[int] = []
    numbers = [n for n in watcher.SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
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
    mix.require_sources(parameters.mix, sources["train"].names)
    encoder = _encoder(str(tokenizer), parameters)
    splitter = Splitter("eval" in sources, None if parameters.mix else parameters.max_rows)
    processes = processes or len(os.sched_getaffinity(0))
    tally = Tally()
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
        targets: dict[Split, SplitFile | Mixture] = {**splits}
        if parameters.mix:
            stored = folder / "mix.partial"
            stack.callback(stored.unlink, missing_ok=True)
            targets["train"] = mixture = Mixture(stored, parameters.mix)
        size = sum(source.path.stat().st_size for source in sources.values())
        bar = stack.enter_context(progress.bar(total=size, desc="prepare", unit="B"))
        arguments = {"tokenizer": str(tokenizer), "parameters": parameters}
        for split in sorted(sources):  # eval first: it decides what leaks
            forms: dict[int, str] = {}
            for rows, read_bytes in encode_chunks(sources[split], cache, processes, **arguments):
                rows = _reject_stray_text(rows, sources[split], forms, parameters)  # noqa: PLW2901
                rows, has_own_eval = _with_source(rows, sources[split])  # noqa: PLW2901
                is_first = rows["is_first"].to_numpy()
                heads = rows if is_first.all() else rows.filter(rows["is_first"])
                outcomes = _assign(splitter, heads, split, has_own_eval[is_first])
                of_rows = outcomes if heads is rows else outcomes[np.cumsum(is_first) - 1]
                for target, file in targets.items():
                    file.add(rows.filter(of_rows == target))
                rejections.add(sources[split], heads.filter(outcomes == "rejected"))
                tally.add(heads, outcomes)
                bar.update(read_bytes)
                if splitter.is_full and sources[split].all_have_eval:
                    break
        bar.close()
        metrics = tally.figures()
        limits.require_rows(parameters, metrics, rejections.reasons, rejections.first)
        metrics |= {"mix": mixture.draw(splits["train"], parameters)} if parameters.mix else {}
        metrics |= {str(split): file.figures() for split, file in splits.items()}
        metrics |= {"template": parameters.template} | encoder.figures()
        limits.require_splits(metrics, splitter)
        if model is not None:
            longest = max(file.longest for file in splits.values())
            limits.require_fit(model, parameters, longest, max(f.last_id for f in splits.values()))
    files.write_json(folder / "format.json", encoder.template.format().model_dump())
    tally.tell_unknown()
    return metrics


def _reject_stray_text(
    rows: pa.Table, source: Source, forms: dict[int, str], parameters: Prepare
) -> pa.Table:
    """Reject plain text in a file whose first row is of turns; `forms`: of the first, by part."""
    parts, found = source.parts_of(rows["line"].to_numpy()), rows["form"].to_pylist()
    usable = pc.is_null(rows["reason"]).to_numpy()
    for part, form in zip(parts[usable].tolist(), compress(found, usable), strict=True):
        forms.setdefault(part, form)
    turns = np.array([forms.get(part, "text") != "text" for part in parts.tolist()], bool)
    stray = usable & turns & np.array([form == "text" for form in found], bool)
    if parameters.format != "auto" or not stray.any():
        return rows
    why = (
        "`text` has no turns, unlike the rows before; set prepare.format: text to learn it as it is"
    )
    reasons = pc.if_else(pa.array(stray), why, rows["reason"])
    rows = rows.set_column(rows.schema.get_field_index("reason"), "reason", reasons)
    return rows.filter(pa.array(~stray | rows["is_first"].to_numpy()))


def _with_source(rows: pa.Table, source: Source) -> tuple[pa.Table, np.ndarray]:
    """Fill `source`; and whether the row's source has an eval split, bool [rows]."""
    parts = source.parts_of(rows["line"].to_numpy())
    names = [part.get("source") for part in source.parts]
    column = pa.array(names, pa.string()).take(pa.array(parts))
    rows = rows.set_column(rows.schema.get_field_index("source"), "source", column)
    return rows, np.array([name in source.with_eval for name in names], bool)[parts]


def _assign(
    splitter: Splitter, rows: pa.Table, split: Split, has_own_eval: np.ndarray
) -> np.ndarray:
    is_eval = pc.fill_null(rows["is_held_out"], False).to_numpy() & ~has_own_eval
    if split == "eval":
        is_eval = np.ones(len(rows), bool)
    columns = (pc.fill_null(rows[name], "") for name in ("conversation_id", "question"))
    ids, questions = (np.array(column.to_pylist(), "S32") for column in columns)
    return splitter.assign(pc.is_null(rows["reason"]).to_numpy(), is_eval, ids, questions)
