"""Our training step beside those of `trl` and Unsloth on a GPU, on models of 7 and 8 billion.

Reads:  the shipped configs (sizes only); weights and tokens are random, and nothing is fetched
Writes: benchmarks/results/training_cuda.json, the table in docs/performance.md
Run:    python -m benchmarks.training_cuda      (Llama-3.1 8B has the sizes of Llama-3-8B)

Conversations of 2,048 tokens, all learnt: a batch of them has no padding, so packed and not are the
same. Each way of computing a step is a process of its own, alone on the GPU. Ours computes as the
plan chooses, and once more in micro-batches of 8,192 tokens without checkpointing; a peer is tried
with and without checkpointing, in micro-batches of 8,192 and of 2,048 tokens. What the device has
no room for is a line of the table too. Last, Mistral-7B within 16 GiB.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks import random_folder
from benchmarks.paced import Worker
from benchmarks.page import put
from benchmarks.training_cuda_table import RESULTS, Result, Way, table, text
from benchmarks.training_data import training_params
from stages.plan import operations
from stages.plan.named import CONFIGS
from stages.shared import files, progress
from stages.shared.adapter import of_parameters
from stages.shared.architecture import model_of_config
from stages.shared.tuning import Tuning
from stages.train.environment import environment

WORKERS = {
    "ours": "benchmarks.training_ours",
    "trl": "benchmarks.training_trl",
    "unsloth": "benchmarks.training_unsloth",
}
MODELS = ("Llama-3-8B", "Mistral-7B")
CAPPED, CAP_GIB = "Mistral-7B", 16
LENGTH = 2048  # tokens
BATCH = 16  # conversations a step
STEPS = 8  # the first two to warm up
WARM = 2
RESOLVED = ("micro_batch_tokens", "gradient_checkpointing", "unfused_because")


def operations_per_token(config: Path, length: int) -> float:
    """Of a training step without checkpointing, every token learnt: 31.9e9 for the 8B at 2,048."""
    model = model_of_config(config)
    tuning = Tuning("nf4", of_parameters(model.tensors, training_params().lora))
    return operations.of_token(model, tuning, 1.0, length).total


def ways(length: int, cap_gib: int | None, present: Sequence[str]) -> Iterator[Way]:
    """What is tried, ours first; a cap leaves nothing but the plan's choice to ours."""
    wide = max(1, 8192 // length)
    yield Way("ours", None, None, cap_gib)
    if cap_gib is None:
        yield Way("ours", wide, False)
    for who in present:
        for checkpointed, micro_batch in product((False, True), (wide, 1)):
            yield Way(who, micro_batch, checkpointed, cap_gib)


def measure(name: str, config: Path, folder: Path, length: int, way: Way, device: str) -> Result:
    """Take steps in a process of its own.

    Args:
        name: of the model.
        config: its `config.json`.
        folder: with model, tokenizer and data.
        length: of the conversations, in tokens.
        way: who computes, and how.
        device: cpu or cuda.
    """
    ours = way.who == "ours"
    job = {
        "model": str(folder / "model"),
        "tokenizer": str(folder / "tokenizer"),
        "data": str(folder / "data"),
        "batch_size": BATCH,
        "pack_tokens": None,
        "length": length,
        "device": device,
        "steps": np.arange(BATCH * STEPS).reshape(STEPS, BATCH).tolist() if ours else STEPS,
        **asdict(way),
    }
    variables = {"QLORA_DEVICE": device, "QLORA_DEVICES": "1"}
    if way.cap_gib is not None:
        variables["QLORA_MEMORY_BUDGET"] = str(way.cap_gib)
    if way.micro_batch is not None:
        variables["QLORA_MICRO_BATCH_TOKENS"] = str(way.micro_batch * length)
        variables["QLORA_GRADIENT_CHECKPOINTING"] = str(way.gradient_checkpointing).lower()
    cost = operations_per_token(config, length)
    try:
        with Worker(WORKERS[way.who], job, variables) as worker:
            steps = [worker.ask() for _ in range(STEPS)][WARM:]
            resolved = {key: worker.found[key] for key in RESOLVED if key in worker.found}
            return Result(name, way, resolved, cost, steps)
    except SystemExit as failure:
        if "OutOfMemoryError" not in str(failure) and "UserError" not in str(failure):
            raise
        return Result(name, way, {}, cost, [])


def make_inputs(config: Path, folder: Path, length: int, device: torch.device) -> None:
    """Write a random model, a tokenizer and conversations into a folder."""
    wanted = AutoConfig.from_pretrained(config)
    random_folder.write_conversations(folder / "data", [length] * BATCH * STEPS, wanted.vocab_size)
    random_folder.write_tokenizer(folder / "tokenizer")
    random_folder.write_model(wanted, folder / "model", device)


def peers() -> list[str]:
    """Those that are installed."""
    return [name for name in ("trl", "unsloth") if importlib.util.find_spec(name)]


def measure_all(
    models: Mapping[str, Path], length: int, device: str, cap_gib: int | None
) -> Iterator[Result]:
    """Every way on every model, under a progress bar; last, the capped model within its cap."""
    wanted: list[tuple[str, int | None]] = [(name, None) for name in models]
    if cap_gib is not None:
        wanted += [(name, cap_gib) for name in models if name == CAPPED]
    for name, cap in wanted:
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            make_inputs(models[name], folder, length, torch.device(device))
            tried = list(ways(length, cap, peers()))
            with progress.bar(total=len(tried), desc=name, unit="way") as bar:
                for way in tried:
                    yield measure(name, models[name], folder, length, way, device)
                    bar.update()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this machine has no CUDA device that torch can use")
    models = {name: CONFIGS / f"{name}.json" for name in given.models}
    results = []
    for result in measure_all(models, LENGTH, "cuda", CAP_GIB):
        results.append(result)
        print(table([result]).splitlines()[-1], flush=True)
    found = {
        "environment": environment(torch.device("cuda", 0)),
        "results": [asdict(result) for result in results],
    }
    files.write_json(RESULTS, found)
    put("training on a GPU", text(found))


if __name__ == "__main__":
    main()
