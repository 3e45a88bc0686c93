"""Prepare conversations: text, tokens and loss masks, split into train and eval.

Reads:  data/raw, models/tokenizer, models/base/config.json
Writes: data/prepared/train.parquet, data/prepared/eval.parquet, data/prepared/rejected.jsonl,
        data/prepared/format.json, reports/prepare.json, reports/details/prepare.json
Run:    python -m stages.prepare
        python -m stages.prepare --show 3   (prints prepared rows, supervised text in colour)
"""

import os
import sys
from argparse import ArgumentParser, Namespace
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from stages.prepare.config import Params
from stages.shared.core import files, params
from stages.shared.core.command import run
from stages.shared.core.display import visible
from stages.shared.core.errors import UserError

RAW = Path("data/raw")
TOKENIZER = Path("models/tokenizer")
MODEL = Path("models/base/config.json")
PREPARED = Path("data/prepared")
METRICS = Path("reports/prepare.json")
DETAILS = Path("reports/details/prepare.json")
SHOWN = ["conversation_id", "input_ids", "loss_mask", "weights", "source", "turn"]
COUNTS = ("conversations", "rows", "tokens", "supervised_tokens", "longest_tokens", "by_source")
COMPARED = {"rows_in", "rejected", "duplicates", "leaked", "truncated", "mix"}
COMPARED |= {f"{split}.{count}" for split in ("train", "eval") for count in COUNTS}


def add_options(parser: ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--show", type=int, metavar="ROWS", help="print prepared rows")


def main(options: Namespace | None) -> None:
    """Prepare both splits and write the metrics."""
    if options is not None and options.show is not None:
        # Of the streams, the one that takes escape codes.
        show(PREPARED / "train.parquet", TOKENIZER, options.show, sys.__stdout__ or sys.stdout)
        return
    settings = params.load(Params, "prepare")
    # Imported late: a mistake in params.yaml is reported before transformers takes seconds.
    from stages.prepare.dataset import prepare  # noqa: PLC0415

    metrics = prepare(RAW, TOKENIZER, MODEL, PREPARED, settings.prepare)
    files.write_report(METRICS, DETAILS, metrics, COMPARED)


def show(split: Path, tokenizer: Path, count: int, stream: TextIO) -> None:
    """Print the first `count` rows of a split to a stream that takes escape codes.

    Supervised text is green on a terminal, elsewhere in brackets.
    """
    if count < 1:
        raise UserError(f"--show: is {count}. Give the number of rows, at least 1.")
    import pyarrow.parquet as pq  # noqa: PLC0415

    from stages.shared.chat.tokenizer import load_tokenizer  # noqa: PLC0415

    decode = load_tokenizer(tokenizer).decode
    marks = (
        ("\x1b[32m", "\x1b[0m")
        if stream.isatty() and not os.environ.get("NO_COLOR")
        else ("[", "]")
    )
    with pq.ParquetFile(split) as file:
        batch = next(file.iter_batches(count, columns=SHOWN, use_threads=False))
    for number, row in enumerate(batch.to_pylist(), start=1):
        mask = row["loss_mask"]
        parts = [f"row {number}", f"conversation {row['conversation_id'][:12]}"]
        parts += [f"{name} {row[name]}" for name in ("source", "turn") if row[name] is not None]
        parts += [f"{len(mask)} tokens", f"{sum(mask)} supervised"]
        if row["weights"] is not None:
            parts.append(f"weights {', '.join(f'{w:g}' for w in sorted({*row['weights']} - {0}))}")
        print(f"── {visible(', '.join(parts))}", file=stream)
        edges = [0, *(at for at in range(1, len(mask)) if mask[at] != mask[at - 1]), len(mask)]
        # Differences of prefixes, as some tokenizers strip the first token of a text.
        texts = [decode(row["input_ids"][:end], skip_special_tokens=False) for end in edges]
        for at, (before, text) in enumerate(pairwise(texts)):
            begin, end = marks if mask[edges[at]] else ("", "")
            print(begin, visible(text[len(before) :]), end, sep="", end="", file=stream)
        print("\n", file=stream)


if __name__ == "__main__":
    run(main, add_options)
