"""Training on one GPU against trl.

Models of the shipped configs with random weights; conversations of random tokens, all of one length
and supervised, so no batch has padding. Every setting runs alone on the GPU, first for one step
(compilation, autotuning), then measured; one that does not fit or fails is a row of the table.

Reads:  stages/plan/configs (sizes only); nothing is fetched
Writes: the table `gpu` in docs/benchmarks.md
Run:    python -m benchmarks.gpu                     (as `make extras` installs trl)
        python -m benchmarks.gpu --model Mistral-7B --budget 16
"""

import gc
import importlib.util
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
from stages.shared.core import display
from stages.shared.core.command import run
from stages.shared.core.errors import UserError

CONFIGS = ROOT / "stages/plan/configs"
BATCH, STEPS = 16, 8  # conversations a step; steps of a measured run
GIB = 2**30
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "needs", "fits")


def write_model(name: str, folder: Path, device: str) -> None:
    """Write a model with random weights in NF4 with double quantization, and a tokenizer."""
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json")
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.save_pretrained(folder / "base")
    del base
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
    """Write random tokens, all supervised but the first; the eval split has one row."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for split, rows in (("train", count), ("eval", 1)):
        ids = [draw.integers(3, vocabulary, length).tolist() for _ in range(rows)]
        table = pa.table({"input_ids": ids, "loss_mask": [[False] + [True] * (length - 1)] * rows})
        pq.write_table(table, folder / f"{split}.parquet")


def training(work: Workspace, options: Namespace, peers: list[str]) -> pd.DataFrame:
    """A row per setting.

    Ours as the plan chooses; peers with 8,192 tokens at once, with and without checkpointing, or
    within a budget one conversation at once, checkpointed.
    """
    wide = max(1, 8192 // options.length)
    peer_settings = [(1, True)] if options.budget else [(wide, False), (wide, True)]
    settings: list[tuple[str, Any]] = [("ours", None), *product(peers, peer_settings)]
    rows = []
    with display.bar(total=len(settings), desc=options.model, unit="setting") as bar:
        for who, setting in settings:
            rows.append({"who": who} | row_of(work, options, who, setting))
            bar.update()
    name = options.model + (f" within {options.budget} GiB" if options.budget else "")
    return pd.DataFrame(rows).assign(model=name)[["model", *rows[0]]]


def row_of(
    work: Workspace, options: Namespace, who: str, setting: tuple[int, bool] | None
) -> dict[str, str]:
    """A row of the table; `setting` is a peer's (conversations at once, checkpointed)."""
    budget = {"memory_budget": options.budget} if options.budget else {}
    row = dict.fromkeys(("at once", "checkpointed", "tokens/s", "peak, GiB"), "")
    try:
        for steps in (1, STEPS):
            if setting is None:
                work.set_params({"train.max_steps": steps})
                metrics = work.train(options.device, devices=1, **budget)
                at_once = f"{metrics['micro_batch_tokens']:,} tokens"
                checkpointed = metrics["gradient_checkpointing"]
            else:
                at_once, checkpointed = str(setting[0]), setting[1]
                job = {"micro_batch": setting[0], "checkpointing": checkpointed, "steps": steps}
                job |= {"length": options.length, "cap_gib": options.budget}
                metrics = work.train_peer(who, device=options.device, pack_tokens=None, **job)
    except SystemExit as failure:
        full = any(text in str(failure) for text in OUT_OF_MEMORY)
        return row | {"tokens/s": "does not fit" if full else "fails"}
    return row | {
        "at once": at_once,
        "checkpointed": "yes" if checkpointed else "no",
        "tokens/s": f"{metrics['tokens_per_second']:,.0f}",
        "peak, GiB": f"{metrics['peak_memory_bytes'] / GIB:.2f}",
    }


def add_options(parser: ArgumentParser) -> None:
    """Arguments of the command line."""
    names = sorted(path.stem for path in CONFIGS.glob("*.json"))
    parser.add_argument("--model", choices=names, default="Llama-3-8B")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a conversation")
    parser.add_argument("--budget", type=int, help="GiB that may be used")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")


def main(options: Namespace) -> None:
    """Measure, publish."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device that torch can use")
    peers = ["trl"] if importlib.util.find_spec("trl") else []
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


if __name__ == "__main__":
    run(main, add_options)
