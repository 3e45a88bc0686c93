"""Training on one GPU: ours against trl and Unsloth, and planned against allocated memory.

Models of the shipped configs with random weights, quantized by transformers; conversations of
random tokens, all of one length and supervised, so that no batch has padding. Every way of
computing is `python -m stages.train` or a process of the peer, alone on the GPU, run once for one
step (compilation, autotuning) and once measured. Allocated is `torch.cuda.max_memory_allocated`. It
does not count paged optimizer states, so their 8 bytes a parameter are taken from the plan too.
A way that does not fit or fails is a line of the table.

Reads:  stages/plan/configs (sizes only); nothing is fetched
Writes: the tables `gpu` and `plan on a gpu` in docs/benchmarks.md
Run:    python -m benchmarks.gpu                     (as `make extras` installs trl)
        python -m benchmarks.gpu --unsloth-python .venv-unsloth/bin/python
        python -m benchmarks.gpu --model Mistral-7B --budget 16
"""

import gc
import importlib.util
import sys
from argparse import ArgumentParser, Namespace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from benchmarks.common import ROOT, Workspace, machine, publish, workspace
from stages.shared.core import progress
from stages.shared.core.errors import UserError, run

CONFIGS = ROOT / "stages/plan/configs"
BATCH, STEPS = 16, 8  # conversations a step; steps of a measured run
GIB = 2**30
NO_ROOM = ("OutOfMemoryError", "out of memory", "needs", "fits")


def write_model(name: str, folder: Path, device: str) -> None:
    """Write a model with random weights in NF4 with double quantization, and a tokenizer."""
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json")
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
            folder / "base"
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    AutoModelForCausalLM.from_pretrained(
        folder / "base",
        dtype=torch.bfloat16,
        quantization_config=quantization,
        device_map={"": device},
    ).save_pretrained(folder / "quantized")
    words = {"<pad>": 0, "<end>": 1, "<unknown>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unknown>")),  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        eos_token="<end>",  # noqa: S106
    ).save_pretrained(folder / "tokenizer")
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def write_conversations(folder: Path, count: int, length: int, vocabulary: int = 30_000) -> None:
    """Write both splits: random tokens, all supervised but the first; one is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for split, rows in (("train", count), ("eval", 1)):
        ids = [draw.integers(3, vocabulary, length).tolist() for _ in range(rows)]
        table = pa.table({"input_ids": ids, "loss_mask": [[False] + [True] * (length - 1)] * rows})
        pq.write_table(table, folder / f"{split}.parquet")


def ours(work: Workspace, device: str, steps: int, **variables: Any) -> dict[str, Any]:
    """Metrics of the stage after so many steps."""
    work.set_params({"train.max_steps": steps})
    env = {"QLORA_DEVICE": device, "QLORA_DEVICES": "1"}
    env |= {f"QLORA_{name.upper()}": str(value) for name, value in variables.items()}
    work.run("stages.train", env=env)
    return work.read_json("reports/train.json")


def peer(
    work: Workspace, name: str, python: str, device: str, steps: int, **job: Any
) -> dict[str, Any]:
    """Figures of a peer after so many steps."""
    figures, _ = work.run_peer(
        name,
        python=python,
        data=str(work.root / "data/prepared/train.parquet"),
        model=str(work.root / "models/quantized"),
        tokenizer=str(work.root / "models/tokenizer"),
        device=device,
        steps=steps,
        lora=work.params["lora"],
        train=work.params["train"],
        **job,
    )
    return figures | {"tokens_per_second": figures["tokens"] / figures["seconds"]}


def training(work: Workspace, options: Namespace, peers: dict[str, str]) -> pd.DataFrame:
    """A row for each way of computing a step.

    Ours as the plan chooses; peers with 8,192 tokens at once, checkpointed and not, or within a
    budget with one conversation at once, checkpointed.
    """
    wide = max(1, 8192 // options.length)
    settings = [(1, True)] if options.budget else [(wide, False), (wide, True)]
    ways: list[tuple[str, Any]] = [("ours", None), *((p, s) for p in peers for s in settings)]
    rows = []
    with progress.bar(total=len(ways), desc=options.model, unit="way") as bar:
        for who, setting in ways:
            rows.append({"who": who} | row_of(work, options, who, setting, peers.get(who, "")))
            bar.update()
    name = options.model + (f" within {options.budget} GiB" if options.budget else "")
    return pd.DataFrame(rows).assign(model=name)[["model", *rows[0]]]


def row_of(
    work: Workspace, options: Namespace, who: str, setting: tuple[int, bool] | None, python: str
) -> dict[str, str]:
    """Figures of one way, after a run of one step; a setting is of a peer."""
    budget = {"memory_budget": options.budget} if options.budget else {}
    row = dict.fromkeys(("at once", "checkpointed", "tokens/s", "peak, GiB"), "")
    try:
        for steps in (1, STEPS):
            if setting is None:
                got = ours(work, options.device, steps, **budget)
                setting_text = (
                    f"{got['micro_batch_tokens']:,} tokens",
                    got["gradient_checkpointing"],
                )
            else:
                job = {"micro_batch": setting[0], "checkpointing": setting[1], "pack_tokens": None}
                job |= {"length": options.length, "cap_gib": options.budget}
                setting_text = f"{setting[0]}", setting[1]
                got = peer(work, who, python, options.device, steps, **job)
    except SystemExit as failure:
        no_room = any(text in str(failure) for text in NO_ROOM)
        return row | {"tokens/s": "does not fit" if no_room else "fails"}
    at_once, checkpointed = setting_text
    row |= {"at once": at_once, "checkpointed": "yes" if checkpointed else "no"}
    speed, peak = got["tokens_per_second"], got["peak_memory_bytes"]
    return row | {"tokens/s": f"{speed:,.0f}", "peak, GiB": f"{peak / GIB:.2f}"}


def plan(work: Workspace, options: Namespace) -> pd.DataFrame:
    """Planned against allocated bytes of real steps, a row a setting."""
    rows = []
    lengths = options.length // 4, options.length
    for length, rank, checkpointed in product(lengths, (8, 64), (True, False)):
        write_conversations(work.root / "data/prepared", BATCH, length)
        work.set_params({"lora.r": rank, "lora.alpha": 2 * rank, "prepare.max_length": length})
        got = ours(
            work,
            options.device,
            1,
            gradient_checkpointing=str(checkpointed).lower(),
            micro_batch_tokens=length,
        )
        paged = 8 * got["trainable_parameters"] if options.device == "cuda" else 0
        planned = got["predicted_memory_bytes"] - paged
        rows.append(
            {
                "model": options.model,
                "tokens": f"{length:,}",
                "rank": str(rank),
                "checkpointed": "yes" if checkpointed else "no",
                "planned, GiB": f"{planned / GIB:.2f}",
                "allocated": f"{got['peak_memory_bytes'] / GIB:.2f}",
                "error": f"{planned / got['peak_memory_bytes'] - 1:+.1%}",
            }
        )
    return pd.DataFrame(rows)


def add_options(parser: ArgumentParser) -> None:
    """Arguments of the command line."""
    names = sorted(path.stem for path in CONFIGS.glob("*.json"))
    parser.add_argument("--model", choices=names, default="Llama-3-8B")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a conversation")
    parser.add_argument("--budget", type=int, help="GiB that may be used")
    parser.add_argument("--unsloth-python", help="a Python that has Unsloth")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")


def main(options: Namespace) -> None:
    """Make the model, measure, write."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device that torch can use")
    peers = {"trl": sys.executable} if importlib.util.find_spec("trl") else {}
    if options.unsloth_python:
        peers["unsloth"] = options.unsloth_python
    params = {
        "train.batch_size": BATCH,
        "train.learning_rate": 1e-12,
        "train.scheduler": "constant",
        "train.warmup": 0.0,
        "prepare.max_length": options.length,
        "lora.target_modules": "all-linear",
    }
    with workspace(params) as work:
        write_model(options.model, work.root / "models", options.device)
        write_conversations(work.root / "data/prepared", BATCH * STEPS, options.length)
        where = machine(torch.cuda.get_device_name() if options.device == "cuda" else "")
        publish("gpu", training(work, options, peers), where)
        publish("plan on a gpu", plan(work, options), where)


if __name__ == "__main__":
    run(main, add_options)
