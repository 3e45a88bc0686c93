"""Training step: `python -m stages.train` against trl's SFTTrainer, on a CPU or one GPU.

Both train a LoRA adapter on the same tokens for one epoch, in as many steps, at a learning rate
that changes nothing: the mean losses must agree within 1 %. Each mode of trl runs once; its fastest
then alternates with ours (A B A B), every run in its own process. Peak memory is that of the
process, or what torch allocated on the GPU. `of the bound`: the time of the step's frozen matmuls
alone at the machine's matmul rate, measured before each run, over the time of the step. Nothing
else should run on the machine; LD_PRELOAD and QLORA_* have their effect.

Reads:  the default's models of `dvc repro`; the sample, and ../shared/data/conversations if present
        With --random: a shipped config, random weights and tokens, conversations of one length
Writes: the table `train` or `gpu` in docs/benchmarks.md
Run:    make bench
        python -m benchmarks.train --random Llama-3-8B [--budget 16]
"""

import importlib.util
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig

from benchmarks.common import ROOT, Workspace, machine, publish, workspace
from benchmarks.memory import random_base
from stages.plan.config import CONFIGS
from stages.quantize.__main__ import Quantize
from stages.quantize.convert import convert
from stages.shared.core import files
from stages.shared.core.command import run
from stages.shared.core.errors import UserError
from stages.shared.step.memory.predict import StepCounter
from stages.shared.weights.precision import compute_dtype
from tests import tiny

SOURCES = {
    "sample": ROOT / "data/sample/conversations.jsonl",
    "real": ROOT / "../shared/data/conversations",
}
# At this learning rate no weight changes.
PARAMS = {
    "train.learning_rate": 1e-12,
    "train.scheduler": "constant",
    "train.warmup": 0.0,
    "lora.target_modules": "all-linear",
}
CONVERSATIONS = {"cpu": 8, "cuda": 16}  # of a step
# M, K, N of the matmul whose rate is measured: a small model's, or large enough to fill a GPU.
MATMUL = {"cpu": (2048, 1024, 1024), "cuda": (8192, 8192, 8192)}
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "needs", "fits")
MODE = ["who", "at once", "checkpointed"]
COUNTS = ["loss", "tokens_per_second", "peak_memory_bytes", "share"]


class Mode(NamedTuple):
    """How trl computes a step."""

    conversations: int | None  # at once; None: packed
    checkpointed: bool = False


def prepare_source(work: Workspace, source: Path, rows: int) -> None:
    """Fetch and prepare conversations for the default's models; held out are the same rows."""
    work.set_params({"data.path": str(source.resolve()), "prepare.max_rows": rows})
    for name in ("quantized", "base", "tokenizer", "source.json"):
        work.link(f"models/{name}", ROOT / "models" / name)
    work.run("stages.fetch_data")
    work.run("stages.prepare")
    split = work.root / "data/prepared/eval.parquet"
    split.unlink()
    split.hardlink_to(split.with_name("train.parquet"))


def write_random(work: Workspace, config: Path, rows: int, options: Namespace) -> None:
    """Write a random model in NF4 with double quantization, and random tokens, all supervised."""
    device, length = torch.device(options.device), options.length
    work.set_params({"prepare.max_length": length})
    section = {"precision": "nf4", "double_quant": True, "compute_dtype": "bf16"}
    (quantized := work.root / "models/quantized").mkdir(parents=True)
    loaded = AutoConfig.from_pretrained(config)
    with device:
        base = random_base(loaded, work.root / "models/base")
    convert(base, quantized, Quantize.model_validate(section), device)
    tiny.tokenizer().save_pretrained(work.root / "models/tokenizer")
    tiny.prepared(folder := work.root / "data/prepared")  # for format.json
    files.write_json(work.root / "models/source.json", {"source": "path"})
    draw = np.random.default_rng(0)
    ids = [draw.integers(3, min(loaded.vocab_size, 30_000), length).tolist() for _ in range(rows)]
    table = pa.table({"input_ids": ids, "loss_mask": [[False] + [True] * (length - 1)] * rows})
    for split in ("train", "eval"):
        pq.write_table(table, folder / f"{split}.parquet")


def matmul_rate(device: str) -> float:
    """FLOP/s of a matmul in the device's compute dtype: the median of eight."""
    rows, inner, columns = MATMUL[device]
    dtype = compute_dtype(torch.bfloat16, device)
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, columns, device=device).to(dtype)
    times = []
    for _ in range(8):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / float(np.median(times))


def train_ours(work: Workspace, options: Namespace, steps: int) -> dict[str, Any]:
    """Metrics of `stages.train`; the loss is that of the held-out rows, which are the same."""
    work.set_params({"train.max_steps": steps, "train.eval_steps": steps})
    budget = {"QLORA_MEMORY_BUDGET": options.budget} if options.budget else {}
    metrics = work.train(QLORA_DEVICE=options.device, QLORA_DEVICES=1, **budget)
    checkpointed = "yes" if metrics["gradient_checkpointing"] else "no"
    mode = {"at once": f"{metrics['micro_batch_tokens']:,} tokens", "checkpointed": checkpointed}
    return metrics | mode | {"loss": metrics["eval_loss"]}


def compare(name: str, work: Workspace, options: Namespace) -> pd.DataFrame:
    """Rows of the table: each mode of trl once, then ours and its fastest in turn."""
    masks = pq.read_table(work.root / "data/prepared/train.parquet")["loss_mask"].to_pandas()
    lengths = masks.map(len)
    with StepCounter(work.root / "models/base/config.json") as counter:
        sizes = counter.model()
    head = sizes["vocabulary"] * sizes["hidden"] * masks.map(sum).sum() / lengths.sum()
    operations = 4 * (sizes["per_token"] + head)  # FLOPs of a token: forward and input gradient
    job = {"pack_tokens": int(max(lengths.sum() // options.steps + 1, lengths.max()))}
    job |= {"device": options.device, "cap_gib": options.budget}
    runs: list[dict[str, Any]] = []

    def measure(mode: Mode | None) -> dict[str, Any]:
        """A run of trl in a mode, or of ours; on a GPU after one of one step, which compiles."""
        run: dict[str, Any] = dict.fromkeys(COUNTS, np.nan) | dict.fromkeys(MODE, "")
        run["who"] = "trl" if mode else "ours"
        if mode:
            run["at once"] = str(mode.conversations or "packed")
            run["checkpointed"] = "yes" if mode.checkpointed else "no"
        rate = matmul_rate(options.device)
        try:
            for steps in (1, options.steps) if options.device == "cuda" else (options.steps,):
                if mode:
                    run |= work.run_peer("trl", **job, **mode._asdict(), steps=steps)[0]
                else:
                    run |= train_ours(work, options, steps)
            run["share"] = operations * run["tokens_per_second"] / rate
        except SystemExit as failure:
            lacks = any(text in str(failure) for text in OUT_OF_MEMORY)
            run["at once"] += ": does not fit" if lacks else ": fails"
        runs.append({key: run[key] for key in (*MODE, *COUNTS)})
        print(runs[-1], flush=True)
        return run

    tried = [Mode(1), Mode(2), Mode(4), Mode(8), Mode(None)]
    if options.random:  # 8,192 tokens at once, or within a budget one conversation
        wide = max(1, 8192 // options.length)
        tried = [Mode(1, True)] if options.budget else [Mode(wide), Mode(wide, True)]
    rates = [measure(mode)["tokens_per_second"] for mode in tried]
    best = tried[int(np.argmax(np.nan_to_num(rates)))]
    for _ in range(options.rounds):
        ours, peer = measure(None)["loss"], measure(best)["loss"]
        if abs(ours - peer) > 0.01 * peer:
            losses = f"loss {ours:.4f}, by trl {peer:.4f}"
            raise UserError(f"{name}: {losses}. The two must train on the same tokens.")
    return summarise(name, pd.DataFrame(runs), len(tried))


def summarise(name: str, runs: pd.DataFrame, tried: int) -> pd.DataFrame:
    """Medians by mode; the ratio to trl's fastest with its range over the rounds."""
    rounds = runs.iloc[tried:]
    ours, fastest = (rounds[rounds["who"] == who].reset_index() for who in ("ours", "trl"))
    ratios = ours["tokens_per_second"] / fastest["tokens_per_second"]
    spread = f"{ratios.median():.2f} ({ratios.min():.2f}–{ratios.max():.2f})"
    rows = []
    for mode, group in runs.groupby(MODE, sort=False):
        median = group[COUNTS].median()
        row = {"conversations": name} | dict(zip(MODE, mode, strict=True))
        row |= {"tokens/s": f"{median['tokens_per_second']:,.0f}"}
        row |= {"of the bound": f"{median['share']:.0%}"}
        row |= {"peak, GB": f"{median['peak_memory_bytes'] / 1e9:.2f}"}
        row |= {"ours : this": spread if mode == tuple(fastest.loc[0, MODE]) else ""}
        rows.append(row | {"runs": str(len(group))})
    return pd.DataFrame(rows)


def add_options(parser: ArgumentParser) -> None:
    """Arguments of the command line."""
    names = sorted(path.stem for path in CONFIGS.glob("*.json"))
    parser.add_argument("--random", choices=names, help="a config, to train on a GPU")
    parser.add_argument("--length", type=int, default=2048, help="of random conversations")
    parser.add_argument("--budget", type=int, help="GiB of the GPU that may be used")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="of ours and trl's fastest mode")


def main(options: Namespace) -> None:
    """Measure, publish."""
    options.device = "cuda" if options.random else "cpu"
    if options.random and not torch.cuda.is_available():
        raise UserError("--random: torch finds no CUDA device here. Run it on a GPU.")
    if not importlib.util.find_spec("trl"):
        raise UserError("trl: not installed. Run `make bench`, which installs it.")
    batch = CONVERSATIONS[options.device]
    tables = []
    for name in [options.random] if options.random else SOURCES:
        with workspace(PARAMS | {"train.batch_size": batch}) as work:
            if options.random:
                write_random(work, CONFIGS / f"{name}.json", batch * options.steps, options)
            elif SOURCES[name].exists():
                prepare_source(work, SOURCES[name], batch * options.steps)
            else:
                continue
            tables.append(compare(name, work, options))
    if options.random:
        publish("gpu", pd.concat(tables), machine(torch.cuda.get_device_name()))
    else:
        publish("train", pd.concat(tables), machine())


if __name__ == "__main__":
    run(main, add_options)
