"""Training step on a CPU: `python -m stages.train` against trl's SFTTrainer.

Both train a LoRA adapter on the same conversations once, in the same number of steps, at a learning
rate so small that the weights stay as they are: then the two mean losses must agree within 1 %,
whatever the order. Every mode of the peer is tried once, the fastest is then measured in turn with
ours (A B A B), each a process of its own. Tokens per second count the conversations' tokens; peak
memory is that of the whole process, its children included for ours. The bound is the time of the
step's frozen matrix products alone at the machine's matrix rate, measured before each process.
Nothing else should run on the machine; LD_PRELOAD and QLORA_* count as set.

Reads:  models/quantized, models/tokenizer, reports/quantize.json of `dvc repro`; the sample, and
        ../shared/data/conversations where present
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
from stages.shared.core import files, progress
from stages.shared.core.errors import UserError, run

SOURCES = {
    "sample": ROOT / "data/sample/conversations.jsonl",
    "real": ROOT / "../shared/data/conversations",
}
MICRO_BATCHES = (1, 2, 4, 8, None)  # conversations of the peer at once; None: packed
LOSS_TOLERANCE = 0.01
GB = 1e9


def parameters(source: Path, steps: int) -> dict[str, Any]:
    """Changes to params.yaml: one epoch of `steps` steps that change nothing."""
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
    """Fetch and prepare the conversations; the training split is the held-out one as well."""
    for name, target in (("quantized", model), ("base", model), ("tokenizer", tokenizer)):
        work.link(f"models/{name}", target)
    work.run("stages.fetch_data")
    work.run("stages.prepare")
    split = work.root / "data/prepared/eval.parquet"
    split.unlink()
    split.hardlink_to(split.with_name("train.parquet"))


def ours(work: Workspace) -> dict[str, Any]:
    """Figures of a training by the stage; the loss is over all conversations."""
    work.run("stages.train", env={"QLORA_DEVICE": "cpu"})
    metrics = work.read_json("reports/train.json")
    keys = ("tokens_per_second", "peak_memory_bytes", "micro_batch_tokens", "workers", "path")
    return {"loss": metrics["eval_loss"], **{key: metrics[key] for key in keys}}


def peer(work: Workspace, micro_batch: int | None, pack_tokens: int) -> dict[str, Any]:
    """Figures of the same training by trl."""
    figures, _ = work.run_peer(
        "trl",
        data=str(work.root / "data/prepared/train.parquet"),
        model=str(work.root / "models/quantized"),
        tokenizer=str(work.root / "models/tokenizer"),
        device="cpu",
        checkpointing=False,
        steps=None,
        micro_batch=micro_batch,
        pack_tokens=pack_tokens,
        lora=work.params["lora"],
        train=work.params["train"],
    )
    return figures | {"tokens_per_second": figures["tokens"] / figures["seconds"]}


def bound_operations(work: Workspace, lengths: pd.Series, supervised: pd.Series) -> float:
    """Operations per token of frozen matrix products: forward, and the gradient of the input.

    4·P for each token and 4·V·h for each supervised one; P counts the blocks' linear layers.
    """
    config = files.read_json(work.root / "models/quantized/config.json")
    linear = files.read_json(ROOT / "reports/quantize.json")["linear_parameters"]
    head = config["vocab_size"] * config["hidden_size"]
    return 4 * (linear + head * float(supervised.sum() / lengths.sum()))


def compare(name: str, work: Workspace, steps: int, rounds: int) -> pd.DataFrame:
    """Rows of the table: each mode of the peer once, then ours and its fastest in turn.

    Raises:
        UserError: the two did not do the same work.
    """
    masks = pq.read_table(work.root / "data/prepared/train.parquet")["loss_mask"].to_pandas()
    lengths = masks.map(len)
    cost = bound_operations(work, lengths, masks.map(sum))
    pack_tokens = max(round(lengths.sum() / steps), lengths.max())
    measured: list[dict[str, Any]] = []

    def measure(who: str, micro_batch: int | None = None) -> dict[str, Any]:
        rate = work.run_peer("rate", device="cpu")[0]["rate"]
        figures = ours(work) if who == "ours" else peer(work, micro_batch, pack_tokens)
        mode = f"{figures['micro_batch_tokens']:,} tokens" if who == "ours" else str(micro_batch)
        share = cost * figures["tokens_per_second"] / rate
        measured.append(figures | {"who": who, "mode": mode.replace("None", "packed"), "of": share})
        return measured[-1]

    with progress.bar(total=len(MICRO_BATCHES) + 2 * rounds, desc=name, unit="run") as bar:
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
                raise UserError(
                    f"{name}: loss {first['loss']:.4f}, and {second['loss']:.4f} by trl"
                )
    return summarise(name, pd.DataFrame(measured))


def summarise(name: str, measured: pd.DataFrame) -> pd.DataFrame:
    """Medians by mode; the ratio to the peer's fastest mode with its range over the rounds."""
    own = measured[measured["who"] == "ours"]
    peers = measured[measured["who"] != "ours"]
    fastest = peers.iloc[len(MICRO_BATCHES) :]
    ratios = own["tokens_per_second"].to_numpy() / fastest["tokens_per_second"].to_numpy()
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
    """Prepare, measure, write."""
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
