"""Encoded rows of raw lines, in batches that do not depend on the number of processes."""

import ctypes
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.prepare.config import Prepare
from stages.prepare.forms import parse
from stages.prepare.loss_mask import Example, ExampleEncoder
from stages.prepare.output import FIGURES, SCHEMA
from stages.prepare.rows import Line, parse_line, read_batches
from stages.prepare.splitting import digest_of, is_held_out
from stages.shared.chat import templates
from stages.shared.chat.conversation import (
    Conversation,
    RejectedRow,
    conversation_id,
    dump,
    to_columns,
)
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core.display import visible
from stages.shared.core.errors import SIGNALS, UserError

ENCODED = pa.schema(
    {
        **{column.name: column.type for column in SCHEMA},
        **FIGURES,
        "line": pa.int64(),
        "reason": pa.string(),  # of the rejection; other columns are null then
        "question": pa.binary(),  # a digest
        "is_held_out": pa.bool_(),
        "truncated": pa.bool_(),
        "dropped_turns": pa.bool_(),
        "unknown": pa.list_(pa.string()),
        "form": pa.string(),
    }
)
BATCH_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_prctl = ctypes.CDLL(None).prctl


def encode_file(
    path: Path, processes: int, tokenizer: str, parameters: Prepare
) -> Generator[tuple[pa.Table, int], None, None]:
    """Encode a file batch by batch: a table of `ENCODED` and the bytes read for it, each time."""
    batches = read_batches(path, BATCH_BYTES)
    workers = min(processes, path.stat().st_size // BATCH_BYTES)
    if workers < 2:
        for lines, size in batches:
            yield encode_rows(lines, tokenizer, parameters), size
        return
    pending = deque[tuple[Future[pa.Table], int]]()
    with _forked(workers) as pool:
        for lines, size in batches:
            pending.append((pool.submit(encode_rows, lines, tokenizer, parameters), size))
            if len(pending) > 2 * workers:
                encoded, read = pending.popleft()
                yield encoded.result(), read
        for encoded, read in pending:
            yield encoded.result(), read


@contextmanager
def _forked(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Pool of forks, which hear no Ctrl-C and end with this process.

    The standard library's: that of `datasets.map` waits for ever for a process that was killed.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the forks are as many as the cores
    pool, caught = ProcessPoolExecutor(workers, get_context("fork"), _begin_fork), list[int]()
    # Deferred by handlers: an exception amid forks leaves orphans, and threads have other masks.
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, lambda got, _: caught.append(got))
    try:
        pool.submit(os.getpid)  # forks all
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    try:
        if caught:
            signal.raise_signal(caught[0])
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "prepare: one of its processes was killed, mostly for want of memory. Free memory, "
            "and run it again."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_fork() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def encode_rows(lines: list[Line], tokenizer: str, parameters: Prepare) -> pa.Table:
    """Parse, render and encode lines: rows of `ENCODED` for each that is not blank."""
    encoder = make_encoder(tokenizer, parameters)
    rows: list[dict[str, Any]] = []
    for number, line in lines:
        if not line.strip():
            continue
        columns: dict[str, Any] = {"line": number, "is_first": True}
        try:
            conversation = parse(parse_line(line), parameters.format, parameters.columns)
            columns["unknown"] = [*map(visible, conversation.unknown)]
            columns["form"] = conversation.form
            examples = encoder.encode(conversation)
        except RejectedRow as reason:
            rows.append({**columns, "reason": visible(str(reason))})
            continue
        except RecursionError:
            rows.append({**columns, "reason": "nested too deeply"})
            continue
        for example in _columns(conversation, examples, parameters):
            rows.append(example | columns)
            columns |= {"is_first": False}
    return pa.Table.from_pylist(rows, schema=ENCODED)


def _columns(
    conversation: Conversation, examples: list[Example], parameters: Prepare
) -> Iterator[dict[str, Any]]:
    """Columns of each of a conversation's examples."""
    longest = [one for one in examples if one.branch == 0][-1]  # it holds all messages
    tools, kwargs = conversation.tools, conversation.template_kwargs
    context: dict[str, Any] = {"tools": tools, "template_kwargs": kwargs}
    context |= {"text": conversation.text, "branches": conversation.branches}
    question = conversation.text or next(
        m["content"] for m in longest.messages if m["role"] == "user"
    )
    shared = {
        "conversation_id": conversation_id(longest.messages, **context),
        "language": conversation.language,
        "tools": dump(tools) if tools else None,
        "template_kwargs": dump(kwargs) if kwargs else None,
        "question": digest_of(question),
        "is_held_out": is_held_out(question, parameters.eval_fraction, parameters.seed),
        "truncated": any(one.truncated for one in examples),
        "dropped_turns": conversation.dropped_turn,
    }
    for one in examples:
        answer = conversation.answer if one is longest and one.answered else None
        yield one._asdict() | shared | {"messages": to_columns(one.messages), "answer": answer}


@lru_cache(maxsize=1)  # forked processes inherit it
def make_encoder(folder: str, parameters: Prepare) -> ExampleEncoder:
    """Load the tokenizer and make the encoder for it."""
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
