"""Training on one and two CPU processes, with whole and with sharded weights: speed and memory.

Run:    `python -m benchmarks.devices`, after `dvc repro`: five minutes of two idle cores
"""

import pandas as pd
import pyarrow.parquet as pq

from benchmarks.common import BASE, ROOT, machine, publish, workspace
from stages.shared.core.command import run

PAGE = ROOT / "docs/clusters.md"
STEPS = 16
WAYS: dict[str, dict[str, object]] = {
    "1 process": {"devices": 1},
    "2 processes": {"devices": 2, "shard": "false"},
    "2 processes, sharded": {"devices": 2, "shard": "true"},
}


def main() -> None:
    """Train in each way on the first conversations of the default's data; publish a row each."""
    rows = []
    for way, variables in WAYS.items():
        with workspace({"train.max_steps": STEPS, "train.eval_steps": STEPS}) as space:
            for path in ("models/quantized", "models/tokenizer", ".counts"):
                space.link(path, ROOT / path)
            space.link("models/base", BASE)
            (space.root / "data/prepared").mkdir(parents=True)
            for split, count in (("train", 8 * STEPS), ("eval", 16)):
                path = f"data/prepared/{split}.parquet"
                pq.write_table(pq.read_table(ROOT / path).slice(0, count), space.root / path)
            metrics = space.train("cpu", **variables)
        sizes = [metrics[f"{kind}_memory_bytes"] / 1e9 for kind in ("predicted", "peak")]
        losses = [metrics[name] for name in ("loss", "eval_loss")]
        row = [f"{metrics['tokens_per_second']:.0f}", *(f"{size:.2f}" for size in sizes)]
        rows.append([way, *row, *(f"{loss:.5f}" for loss in losses)])
        print(rows[-1], flush=True)
    columns = ["training", "tokens/s", "predicted, GB", "held by all, GB", "loss", "eval_loss"]
    publish("devices", pd.DataFrame(rows, columns=columns), machine(), PAGE)


if __name__ == "__main__":
    run(main)
