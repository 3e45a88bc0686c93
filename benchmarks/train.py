"""Training step on a CPU: `python -m stages.train` against trl's SFTTrainer.

Both train a LoRA adapter on the same conversations for one epoch, in the same number of steps, at a
learning rate that changes nothing: the two mean losses must agree within 1 %. Every mode of the
peer runs once; the fastest then alternates with ours (A B A B), each in its own process. Peak
memory is the whole process. The bound is the time of the step's frozen
matmuls alone at the machine's matmul rate, measured before each process. Nothing else should run on
the machine; LD_PRELOAD and QLORA_* have their effect.

Reads:  models/quantized, models/tokenizer, reports/details/quantize.json of `dvc repro`; the
        sample, and ../shared/data/conversations where present
Writes: a table in docs/benchmarks.md
Run:    make bench
"""

import importlib.util
import statistics
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from benchmarks.common import ROOT, Workspace, machine, publish, workspace
from stages.shared.core import display, files
from stages.shared.core.command import run
from stages.shared.core.errors import UserError

SOURCES = {
    "sample": ROOT / "data/sample/conversations.jsonl",
    "real": ROOT / "../shared/data/conversations",
}
MICRO_BATCHES = (1, 2, 4, 8, None)  # conversations of the peer at once; None: packed
LOSS_TOLERANCE = 0.01
GB = 1e9


def parameters(source: Path, steps: int) -> dict[str, Any]:
    """Changes to params.yaml: one epoch of `steps` steps, no weight changed."""
    return {
        "data.source": "file",
        "data.path": str(source.resolve()),
        "prepare.max_rows": 8 * steps,
        "train.batch_size": 8,
        "train.epochs": 1,
        "train.max_steps": None,
        "train.learning_rate": 1e-12,
        "train.scheduler": "constant",
        "train.warmup": 0.0,
        "lora.dropout": 0.0,
        "lora.target_modules": "all-linear",
    }


def set_up(work: Workspace, model: Path, tokenizer: Path) -> None:
    """Fetch and prepare the conversations; the eval split is the training split."""
    for name, target in (("quantized", model), ("base", model), ("tokenizer", tokenizer)):
        work.link(f"models/{name}", target)
    work.run("stages.fetch_data")
    work.run("stages.prepare")
    split = work.root / "data/prepared/eval.parquet"
    split.unlink()
    split.hardlink_to(split.with_name("train.parquet"))


def bound_operations(work: Workspace, lengths: pd.Series, supervised: pd.Series) -> float:
    """FLOPs per token of the frozen matmuls, forward and input gradient.

    4·P per token, P the parameters of the blocks' linear layers, and 4·V·h per supervised token.
    """
    config = files.read_json(work.root / "models/quantized/config.json")
    linear = files.read_json(ROOT / "reports/details/quantize.json")["linear_parameters"]
    head = config["vocab_size"] * config["hidden_size"]
    return 4 * (linear + head * float(supervised.sum() / lengths.sum()))


def compare(name: str, work: Workspace, steps: int, rounds: int) -> pd.DataFrame:
    """Rows of the table: each mode of the peer once, then ours and its fastest in turn."""
    masks = pq.read_table(work.root / "data/prepared/train.parquet")["loss_mask"].to_pandas()
    lengths = masks.map(len)
    cost = bound_operations(work, lengths, masks.map(sum))
    pack_tokens = max(round(lengths.sum() / steps), lengths.max())
    measured: list[dict[str, Any]] = []

    def measure(who: str, micro_batch: int | None = None) -> dict[str, Any]:
        rate = work.run_peer("rate", device="cpu")[0]["rate"]
        if who == "ours":
            metrics = work.train("cpu")
            metrics |= {"loss": metrics["eval_loss"]}
            mode = f"{metrics['micro_batch_tokens']:,} tokens"
        else:
            job = {"checkpointing": False, "steps": None, "pack_tokens": pack_tokens}
            metrics = work.train_peer("trl", device="cpu", micro_batch=micro_batch, **job)
            mode = "packed" if micro_batch is None else str(micro_batch)
        keys = ("loss", "tokens_per_second", "peak_memory_bytes")
        share = cost * metrics["tokens_per_second"] / rate
        measured.append({k: metrics[k] for k in keys} | {"who": who, "mode": mode, "of": share})
        return measured[-1]

    with display.bar(total=len(MICRO_BATCHES) + 2 * rounds, desc=name, unit="run") as bar:
        for size in MICRO_BATCHES:
            measure("trl", size)
            bar.update()
        best = max(
            zip(MICRO_BATCHES, measured, strict=True), key=lambda m: m[1]["tokens_per_second"]
        )
        for _ in range(rounds):
            first, second = measure("ours"), measure("trl", best[0])
            bar.update(2)
            if abs(first["loss"] - second["loss"]) > LOSS_TOLERANCE * second["loss"]:
                losses = f"{first['loss']:.4f}, by trl {second['loss']:.4f}"
                raise UserError(f"{name}: loss {losses}. The two must train on the same tokens.")
    return summarise(name, pd.DataFrame(measured))


def summarise(name: str, measured: pd.DataFrame) -> pd.DataFrame:
    """Medians by mode; the ratio to the peer's fastest mode with its range over the rounds."""
    ours = measured[measured["who"] == "ours"]
    peers = measured[measured["who"] != "ours"]
    fastest = peers.iloc[len(MICRO_BATCHES) :]
    ratios = ours["tokens_per_second"].to_numpy() / fastest["tokens_per_second"].to_numpy()
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
    rows = []
    for (who, mode), group in measured.groupby(["who", "mode"], sort=False):
        rows.append(
            {
                "conversations": name,
                "who": who,
                "at once": mode,
                "tokens/s": f"{group['tokens_per_second'].median():,.0f}",
                "of the bound": f"{group['of'].median():.0%}",
                "peak, GB": f"{group['peak_memory_bytes'].median() / GB:.2f}",
                "ours : this": ratio if mode == fastest["mode"].iloc[0] else "",
                "runs": str(len(group)),
            }
        )
    return pd.DataFrame(rows)


def add_options(parser: ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="of ours and the peer's fastest mode")
    parser.add_argument("--model", type=Path, default=ROOT / "models/quantized")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models/tokenizer")


def main(options: Namespace) -> None:
    """Measure, publish."""
    if not (options.model / "config.json").exists():
        raise UserError(f"{options.model}: not found. Run `dvc repro quantize` first.")
    if not importlib.util.find_spec("trl"):
        raise UserError("trl: not installed. Run `make bench`, which installs it.")
    tables = []
    for name, source in SOURCES.items():
        if not source.exists():
            print(f"{source}: not found, left out")
            continue
        with workspace(parameters(source, options.steps)) as work:
            set_up(work, options.model, options.tokenizer)
            tables.append(compare(name, work, options.steps, options.rounds))
    publish("train", pd.concat(tables), machine())


if __name__ == "__main__":
    run(main, add_options)
