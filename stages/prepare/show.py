"""Prepared rows on a terminal, supervised text in colour; elsewhere in brackets."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow.parquet as pq

from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core.display import visible
from stages.shared.core.errors import UserError

_GREEN, _PLAIN = ("\x1b[32m", "\x1b[0m"), ("[", "]")
_COLUMNS = ["conversation_id", "input_ids", "loss_mask", "weights", "source", "turn"]


def show(split: Path, tokenizer: Path, count: int, stream: TextIO) -> None:
    """Print the first `count` rows of a split to a stream that takes escape codes."""
    if count < 1:
        raise UserError(f"--show: is {count}. Give the number of rows, at least 1.")
    decode = load_tokenizer(tokenizer).decode
    marks = _GREEN if stream.isatty() and not os.environ.get("NO_COLOR") else _PLAIN
    with pq.ParquetFile(split) as file:
        batch = next(file.iter_batches(count, columns=_COLUMNS, use_threads=False))
    for number, row in enumerate(batch.to_pylist(), start=1):
        print(_heading(number, row), file=stream)
        mask = np.array(row["loss_mask"])
        edges = [0, *(np.diff(mask).nonzero()[0] + 1).tolist(), len(mask)]
        # Differences of prefixes, as some tokenizers strip the first token of a text.
        texts = [decode(row["input_ids"][:end], skip_special_tokens=False) for end in edges]
        for at, (before, text) in enumerate(pairwise(texts)):
            begin, end = marks if mask[edges[at]] else ("", "")
            print(begin, visible(text[len(before) :]), end, sep="", end="", file=stream)
        print("\n", file=stream)


def _heading(number: int, row: dict[str, Any]) -> str:
    mask = row["loss_mask"]
    parts = [f"row {number}", f"conversation {row['conversation_id'][:12]}"]
    parts += [
        f"{name} {visible(str(row[name]))}" for name in ("source", "turn") if row[name] is not None
    ]
    parts += [f"{len(mask)} tokens", f"{sum(mask)} supervised"]
    if row["weights"] is not None:
        weights = {w for w, one in zip(row["weights"], mask, strict=True) if one}
        parts.append(f"weights {', '.join(f'{w:g}' for w in sorted(weights))}")
    return f"── {', '.join(parts)}"
