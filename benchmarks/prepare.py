"""Data preparation: `python -m stages.prepare` against `datasets.map`.

Both read the same JSON Lines (the sample repeated, its numbers and a fifth of its words replaced at
random) and write tokens and loss masks to parquet, which must be equal row by row. Rates are of the
rows between the two sizes, so imports and loading the tokenizer do not count; CPU seconds and peak
memory are of the larger.

Reads:  models/tokenizer of `dvc repro`, the sample
Writes: a table in docs/benchmarks.md
Run:    python -m benchmarks.prepare
"""

import json
import random
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from benchmarks.common import ROOT, Usage, Workspace, machine, publish, workspace
from stages.shared.core.command import run
from stages.shared.core.errors import UserError

SAMPLE = ROOT / "data/sample/conversations.jsonl"
PEERS = {"datasets.map": None, "datasets.map, 2 processes": 2}
CHANGED = 0.2  # of the words
WORD = re.compile(r"[^\W\d_]{3,}|\d+")
MARKERS = {"Human", "Assistant"}


def write_conversations(path: Path, rows: int) -> None:
    """Write rows with the sample's lengths and languages, nearly all distinct."""
    sample = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    texts = [row.get("text") or "" for row in sample]
    words = sorted({w for t in texts for w in WORD.findall(t) if w.isalpha()} - MARKERS)
    draw = random.Random(0)  # noqa: S311

    def change(match: re.Match[str]) -> str:
        word = match[0]
        if word.isdigit():
            return str(draw.randrange(10 ** len(word))).zfill(len(word))
        return word if word in MARKERS or draw.random() > CHANGED else draw.choice(words)

    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            changed = WORD.sub(change, texts[index % len(sample)])
            row = sample[index % len(sample)] | {"text": changed}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(work: Workspace, rows: int, tokenizer: Path) -> dict[str, Usage]:
    """Resource usage of each for so many rows; their tokens and masks must be equal."""
    raw = work.root / "conversations.jsonl"
    write_conversations(raw, rows)
    work.run("stages.fetch_data")
    used = {"prepare": work.run("stages.prepare")}
    written = [work.root / f"data/prepared/{split}.parquet" for split in ("train", "eval")]
    for index, (name, processes) in enumerate(PEERS.items()):
        out = work.root / f"peer{index}"
        job = {"data": str(raw), "tokenizer": str(tokenizer.absolute()), "out": str(out)}
        used[name] = work.run_peer("prepare", **job, processes=processes)[1]
        if encoded(*written) != encoded(out / "train.parquet"):
            raise UserError(f"{name}: its tokens or masks are not those of prepare")
    return used


def encoded(*paths: Path) -> set[tuple[bytes, bytes]]:
    """Distinct conversations as (token, mask) bytes."""
    tables = [pq.read_table(path, columns=["input_ids", "loss_mask"]).to_pandas() for path in paths]
    table = pd.concat(tables)
    ids, masks = (table[name].map(lambda row: row.astype("int32").tobytes()) for name in table)
    return set(zip(ids, masks, strict=True))


def add_options(parser: ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--rows", type=int, nargs=2, default=[10_000, 100_000])
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models/tokenizer")


def main(options: Namespace) -> None:
    """Measure at two sizes, publish."""
    if not options.tokenizer.exists():
        raise UserError(f"{options.tokenizer}: not found. Run `dvc repro fetch_model` first.")
    used = []
    for rows in options.rows:
        with workspace({"data.path": "conversations.jsonl"}) as work:
            for name in ("tokenizer", "base"):
                work.link(f"models/{name}", options.tokenizer.with_name(name))
            used.append(measure(work, rows, options.tokenizer))
    few, many = used
    added = options.rows[1] - options.rows[0]
    ours = many["prepare"].seconds - few["prepare"].seconds
    table = [
        {
            "": name,
            "rows/s": f"{added / (many[name].seconds - few[name].seconds):,.0f}",
            "CPU s": f"{many[name].cpu_seconds:.1f}",
            "peak, MB": f"{many[name].peak_bytes / 1e6:,.0f}",
            f"peak of {options.rows[0]:,} rows": f"{few[name].peak_bytes / 1e6:,.0f}",
            "time : ours": f"{(many[name].seconds - few[name].seconds) / ours:.2f}",
        }
        for name in many
    ]
    publish("prepare", pd.DataFrame(table), machine() + f" {options.rows[1]:,} rows.")


if __name__ == "__main__":
    run(main, add_options)
