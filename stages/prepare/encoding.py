"""Encoded rows of raw lines, by `datasets`; they do not depend on the number of processes."""

import ctypes
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.prepare.config import Prepare
from stages.prepare.forms import parse
from stages.prepare.loss_mask import Example, ExampleEncoder
from stages.prepare.output import FIGURES, SCHEMA
from stages.prepare.rows import parse_line, read_chunks
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
CHUNK_BYTES = 8 << 20
BYTES_PER_PROCESS = 1 << 20  # at least
BATCH_ROWS = 1000
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_prctl = ctypes.CDLL(None).prctl
_deferring = False


def encode_file(
    path: Path, processes: int, tokenizer: str, parameters: Prepare
) -> Iterator[tuple[pa.Table, int]]:
    """Encode a file chunk by chunk: a table of `ENCODED` and the bytes read for it, each time."""
    # Imported late: the tokenizer's module must switch the hub off first.
    from datasets import Dataset, Features, disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()
    for lines, size in read_chunks(path, CHUNK_BYTES):
        workers = min(processes, size // BYTES_PER_PROCESS)
        numbers, texts = zip(*lines, strict=True)
        with _signals_deferred() if workers > 1 else nullcontext():
            encoded = Dataset.from_dict({"number": numbers, "line": texts}).map(
                encode_rows,
                input_columns=["number", "line"],
                batched=True,
                batch_size=BATCH_ROWS,
                features=Features.from_arrow_schema(ENCODED),
                remove_columns=["number", "line"],
                fn_kwargs={"tokenizer": tokenizer, "parameters": parameters},
                num_proc=workers if workers > 1 else None,
                keep_in_memory=True,  # pages of a mapped cache file would count as this process's
                new_fingerprint="encoded",  # no hash of the function and its arguments
            )
        yield encoded.with_format("arrow")[:], size


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Defer signals while `datasets` forks and joins: an exception amid these leaves orphans."""
    global _deferring  # noqa: PLW0603  (a fork has no other way to know)
    caught = list[int]()
    heard = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = [signal.signal(number, lambda got, _: caught.append(got)) for number in heard]
    _deferring = True
    try:
        yield
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise UserError(
            "prepare: one of its processes was killed, mostly for want of memory. Free memory, "
            "and run it again."
        ) from None
    finally:
        _deferring = False
        for number, handler in zip(heard, before, strict=True):
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


def _end_with_the_parent() -> None:
    """Let a fork of `datasets` hear no Ctrl-C, and end with this process."""
    if _deferring:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


os.register_at_fork(after_in_child=_end_with_the_parent)


def encode_rows(
    numbers: Sequence[int], lines: Sequence[bytes], tokenizer: str, parameters: Prepare
) -> pa.Table:
    """Parse, render and encode lines: rows of `ENCODED` for each that is not blank."""
    encoder = make_encoder(tokenizer, parameters)
    numbered = [pair for pair in zip(numbers, lines, strict=True) if pair[1].strip()]
    parsed = [_parse(line, parameters) for _, line in numbered]
    conversations = [one for one in parsed if isinstance(one, Conversation)]
    encoded = iter(encoder.encode_conversations(conversations))
    rows: list[dict[str, Any]] = []
    for (number, line), one in zip(numbered, parsed, strict=True):
        columns: dict[str, Any] = {"line": number, "is_first": True, "bytes": len(line)}
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
            columns |= {"is_first": False}
    return pa.Table.from_pylist(rows, schema=ENCODED)


def _parse(row: bytes, parameters: Prepare) -> Conversation | RejectedRow:
    try:
        return parse(parse_line(row), parameters.format, parameters.columns)
    except RejectedRow as reason:
        return reason.with_traceback(None)  # whose frames would hold the batch
    except RecursionError:
        return RejectedRow("nested too deeply")


def _columns(
    conversation: Conversation, examples: list[Example], parameters: Prepare
) -> Iterator[dict[str, Any]]:
    """Columns of each of a conversation's examples."""
    kept = [one for one in examples if one.branch == 0][-1]  # it holds all messages
    tools, kwargs = conversation.tools, conversation.template_kwargs
    context: dict[str, Any] = {"tools": tools, "template_kwargs": kwargs}
    context |= {"text": conversation.text, "branches": conversation.branches}
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
        answer = conversation.answer if one is kept and one.answered else None
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
