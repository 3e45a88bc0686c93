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
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from benchmarks.common import ROOT, Workspace, machine, publish, workspace
from stages.shared.core.command import run
from stages.shared.core.errors import UserError

SAMPLE = ROOT / "data/sample/conversations.jsonl"
PEERS = {"datasets.map": None, "datasets.map, 2 processes": 2}
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
        return word if word in MARKERS or draw.random() > 0.2 else draw.choice(words)

    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            row = sample[index % len(sample)]
            changed = row | {"text": WORD.sub(change, texts[index % len(sample)])}
            file.write(json.dumps(changed, ensure_ascii=False) + "\n")


def measure(work: Workspace, rows: int) -> pd.DataFrame:
    """Resources of each for so many rows; their tokens and masks must be equal."""
    raw = work.root / "conversations.jsonl"
    write_conversations(raw, rows)
    work.run("stages.fetch_data")
    used = {"prepare": work.run("stages.prepare")}
    written = [work.root / f"data/prepared/{split}.parquet" for split in ("train", "eval")]
    for name, processes in PEERS.items():
        out = work.root / name
        _, used[name] = work.run_peer("prepare", data=str(raw), out=str(out), processes=processes)
        if encoded(*written) != encoded(out / "train.parquet"):
            raise UserError(f"{name}: its tokens or masks are not those of prepare")
    return pd.DataFrame({name: asdict(usage) for name, usage in used.items()}).T


def encoded(*paths: Path) -> set[tuple[bytes, bytes]]:
    """Distinct conversations as (token, mask) bytes."""
    tables = [pd.read_parquet(path, columns=["input_ids", "loss_mask"]) for path in paths]
    table = pd.concat(tables).map(lambda values: values.astype("int32").tobytes())
    return set(table.itertuples(index=False, name=None))


def add_options(parser: ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--rows", type=int, nargs=2, default=[10_000, 100_000])


def main(options: Namespace) -> None:
    """Measure at two sizes, publish."""
    used = []
    for rows in options.rows:
        with workspace({"data.path": "conversations.jsonl"}) as work:
            for name in ("tokenizer", "base"):
                work.link(f"models/{name}", ROOT / "models" / name)
            used.append(measure(work, rows))
    few, many = used
    seconds = many["seconds"] - few["seconds"]
    added = options.rows[1] - options.rows[0]
    table = {
        "": many.index,
        "rows/s": (added / seconds).map("{:,.0f}".format),
        "CPU s": many["cpu_seconds"].map("{:.1f}".format),
        "peak, MB": (many["peak_bytes"] / 1e6).map("{:,.0f}".format),
        f"peak of {options.rows[0]:,} rows": (few["peak_bytes"] / 1e6).map("{:,.0f}".format),
        "time : ours": (seconds / seconds["prepare"]).map("{:.2f}".format),
    }
    publish("prepare", pd.DataFrame(table), machine() + f" {options.rows[1]:,} rows.")


if __name__ == "__main__":
    run(main, add_options)
