"""Rows in batches, and two of them under way at once."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from stages.prepare.parsing import Conversation, Form, form_of, parse
from stages.prepare.rows import Row
from stages.prepare.sources import Source
from stages.shared.chat.conversation import RejectedRow

# A batch is bounded in both, so that memory is the same for short rows and for long ones.
ROWS = 1000
BYTES = 500_000

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Batch:
    """Some rows of a file that follow each other.

    Attributes:
        rows: how many.
        form: of the file, as far as it is known by now.
        conversations: what became of the rows, in their order.
        unusable: line and reason of the others.
    """

    rows: int
    form: Form | None
    conversations: list[Conversation]
    unusable: list[tuple[int, str]]


def read(source: Source, form: Form | None, bar: "tqdm[Any]") -> Iterator[Batch]:
    """A file in batches; where no form is given, it is that of the first row that shows one."""
    for rows in _divide(source.rows(), bar):
        conversations, unusable = [], []
        for row in rows:
            form = form or form_of(row.fields)
            try:
                conversations.append(parse(row, form))
            except RejectedRow as reason:
                unusable.append((row.line, str(reason)))
        yield Batch(len(rows), form, conversations, unusable)


def ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Each item with what `work` makes of it, in order.

    `work` runs in one other thread, an item ahead of the caller. A tokenizer computes outside
    Python's lock, and meanwhile the caller reads the next item and writes the last. Where there
    are fewer cores than threads the caller goes first: the tokenizer's own threads, which inherit
    from this one, can share what it leaves, and nobody can do its work for it.
    """
    with ThreadPoolExecutor(max_workers=1, initializer=os.nice, initargs=(5,)) as thread:
        under_way: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            under_way.append((item, thread.submit(work, item)))
            if len(under_way) > 1:
                first, made = under_way.popleft()
                yield first, made.result()
        for last, made in under_way:
            yield last, made.result()


def _divide(rows: Iterator[Row], bar: "tqdm[Any]") -> Iterator[list[Row]]:
    batch: list[Row] = []
    begin = 0
    for row in rows:
        batch.append(row)
        if len(batch) >= ROWS or row.position - begin >= BYTES:
            yield batch
            bar.update(row.position - begin)
            batch, begin = [], row.position
    if batch:
        yield batch
        bar.update(batch[-1].position - begin)
