"""Short trainings of the default's model on this CPU: memory held, and one process against two.

Memory does not depend on the load, so as many of its trainings run at once as there are cores, a
thread each; for speed nothing else should run on the machine.

Reads:  models and data/prepared of `dvc repro`
Writes: a table in docs/memory.md, or in docs/clusters.md
Run:    python -m benchmarks.processes memory      eight kinds of training
        python -m benchmarks.processes devices     whole weights and sharded ones
"""

import os
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from benchmarks.common import CLUSTERS_PAGE, MEMORY_PAGE, ROOT, machine, publish, workspace
from stages.shared.core.command import run

MODELS = ("models/base", "models/tokenizer", "models/source.json")
# Parameters and variables of each training.
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "checkpointed": {"QLORA_GRADIENT_CHECKPOINTING": "true"},
    "rank 128": {"lora.r": 128},
    "not fused": {"QLORA_FUSED": "false"},
    "micro-batches of 128": {"QLORA_MICRO_BATCH_TOKENS": "128"},
    "int8": {"quantize.precision": "int8"},
    "fp32": {"quantize.precision": "fp32"},
    "full, 8-bit AdamW": {
        "quantize.precision": "bf16",
        "train.method": "full",
        "train.optimizer": "adamw_8bit",
    },
}
DEVICES: dict[str, dict[str, Any]] = {
    "one process": {"QLORA_DEVICES": 1},
    "two processes": {"QLORA_DEVICES": 2, "QLORA_SHARD": "false"},
    "two processes, sharded": {"QLORA_DEVICES": 2, "QLORA_SHARD": "true"},
}


def train(name: str, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """Metrics of a training on the first conversations of the default's data."""
    variables = {key: value for key, value in changes.items() if key.isupper()}
    params = {key: value for key, value in changes.items() if key not in variables}
    with workspace(params | {"train.max_steps": steps, "train.eval_steps": steps}) as space:
        for path in (*MODELS, "data/prepared/format.json", ".counts"):
            space.link(path, ROOT / path)
        for split, count in (("train", 8 * steps), ("eval", 40)):
            path = f"data/prepared/{split}.parquet"
            pq.write_table(pq.read_table(ROOT / path).slice(0, count), space.root / path)
        if "quantize.precision" in params:
            space.run("stages.quantize", **variables)
        else:
            space.link("models/quantized", ROOT / "models/quantized")
        metrics = space.train(QLORA_DEVICE="cpu", **variables)
    predicted, held = (metrics[f"{key}_memory_bytes"] for key in ("predicted", "peak"))
    row = {
        "training": name,
        "micro-batch": metrics["micro_batch_tokens"],
        "tokens/s": f"{metrics['tokens_per_second']:.0f}",
        "predicted, GB": f"{predicted / 1e9:.2f}",
        "held, GB": f"{held / 1e9:.2f}",
        "error": f"{predicted / held - 1:+.1%}",
        **{key: f"{metrics[key]:.5f}" for key in ("loss", "eval_loss")},
    }
    print(row, flush=True)
    return row


def add_options(parser: ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("question", choices=("memory", "devices"))
    # Lengths differ from step to step, and so the heap grows for some.
    parser.add_argument("--steps", type=int, default=24, help="of each training")


def main(options: Namespace) -> None:
    """Measure, publish."""
    if options.question == "devices":
        rows = [train(name, changes, options.steps) for name, changes in DEVICES.items()]
        table = pd.DataFrame(rows).drop(columns=["micro-batch", "error"])
        publish("devices", table, machine(), CLUSTERS_PAGE)
    else:
        thread = {"OMP_NUM_THREADS": 1}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = [*pool.map(lambda kind: train(kind, KINDS[kind] | thread, options.steps), KINDS)]
        table = pd.DataFrame(rows).drop(columns=["tokens/s", "loss", "eval_loss"])
        publish("processes", table, machine(), MEMORY_PAGE)


if __name__ == "__main__":
    run(main, add_options)
