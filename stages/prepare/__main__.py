"""Prepare conversations: text, tokens and loss masks, split into train and eval.

Reads:  data/raw, models/tokenizer, models/base/config.json
Writes: data/prepared/train.parquet, data/prepared/eval.parquet, data/prepared/rejected.jsonl,
        data/prepared/format.json, reports/prepare.json, reports/details/prepare.json
Run:    python -m stages.prepare
        python -m stages.prepare --show 3   (prints prepared rows, supervised text in colour)
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from stages.prepare.config import Params
from stages.shared.core import files, params
from stages.shared.core.command import run

RAW = Path("data/raw")
TOKENIZER = Path("models/tokenizer")
MODEL = Path("models/base/config.json")
PREPARED = Path("data/prepared")
METRICS = Path("reports/prepare.json")
DETAILS = Path("reports/details/prepare.json")
COUNTS = ("conversations", "rows", "tokens", "supervised_tokens", "longest_tokens", "by_source")
COMPARED = {"rows_in", "rejected", "duplicates", "leaked", "truncated", "mix"}
COMPARED |= {f"{split}.{count}" for split in ("train", "eval") for count in COUNTS}


def add_options(parser: ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--show", type=int, metavar="ROWS", help="print prepared rows")


def main(options: Namespace | None) -> None:
    """Prepare both splits and write the metrics."""
    if options is not None and options.show is not None:
        from stages.prepare.show import show  # noqa: PLC0415

        # Of the streams, the one that takes escape codes.
        show(PREPARED / "train.parquet", TOKENIZER, options.show, sys.__stdout__ or sys.stdout)
        return
    settings = params.load(Params, "prepare")
    # Imported late: a mistake in params.yaml is reported before transformers takes seconds.
    from stages.prepare.dataset import prepare  # noqa: PLC0415

    metrics = prepare(RAW, TOKENIZER, MODEL, PREPARED, settings.prepare)
    files.write_report(METRICS, DETAILS, metrics, COMPARED)


if __name__ == "__main__":
    run(main, add_options)
