"""Our training step beside those of `trl` and Unsloth on a GPU, on models of 7 and 8 billion.

Reads:  the shipped configs (sizes only); weights and tokens are random, and nothing is fetched
Writes: benchmarks/results/training_cuda.json, the table and the picture in docs/performance.md
Run:    python -m benchmarks.training_cuda      (Llama-3.1 8B has the sizes of Llama-3-8B)
        python -m benchmarks.training_cuda --unsloth-python .venv-unsloth/bin/python

Conversations of 2,048 tokens, all learnt: a batch of them has no padding, so packed and not are the
same. Each way of computing a step is a process of its own, alone on the GPU (the next one may be
importing). Ours computes as the plan chooses; a peer is tried in micro-batches of 8,192 tokens
without and with checkpointing. What the device has no room for, and a peer that fails, is a line of
the table too. Mistral-7B is measured within 16 GiB as well, where a peer has its least:
checkpointing, and a conversation at a time.

Unsloth wants other releases of trl, datasets and transformers: it may have an environment of its
own (--unsloth-python).
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks import random_folder, training_cuda_picture
from benchmarks.paced import Worker
from benchmarks.page import put
from benchmarks.training_cuda_table import RESULTS, Result, Way, results_of, table, text
from benchmarks.training_data import training_params
from stages.plan import operations
from stages.plan.named import CONFIGS
from stages.shared.architecture import model_of_config
from stages.shared.core import files, progress
from stages.shared.step.adapter_sizes import of_parameters
from stages.shared.tuning import Tuning
from stages.train.environment import environment

WORKERS = {
    "ours": "benchmarks.training_ours",
    "trl": "benchmarks.training_trl",
    "unsloth": "benchmarks.training_unsloth",
}
MODELS = ("Llama-3-8B", "Mistral-7B")
CAPS_GIB = {"Llama-3-8B": (None,), "Mistral-7B": (16, None)}
LENGTH = 2048  # tokens
BATCH = 16  # conversations a step
STEPS = 4  # the first to warm up
WARM = 1
RESOLVED = ("micro_batch_tokens", "gradient_checkpointing", "unfused_because")


def operations_per_token(config: Path, length: int) -> float:
    """Of a training step without checkpointing, every token learnt: 31.9e9 for the 8B at 2,048."""
    model = model_of_config(config)
    tuning = Tuning("nf4", of_parameters(model.tensors, training_params().lora))
    return operations.of_token(model, tuning, 1.0, length).total


def ways(length: int, cap_gib: int | None, present: Iterable[str]) -> Iterator[Way]:
    """What is tried, ours first, which the plan chooses."""
    yield Way("ours", None, None, cap_gib)
    wide = max(1, 8192 // length)
    tried = ((wide, False), (wide, True)) if cap_gib is None else ((1, True),)
    for who in present:
        for micro_batch, checkpointed in tried:
            yield Way(who, micro_batch, checkpointed, cap_gib)


def start(way: Way, folder: Path, length: int, device: str, python: str) -> Worker:
    """Start a process that takes steps.

    Args:
        way: who computes, and how.
        folder: with model, tokenizer and data.
        length: of the conversations, in tokens.
        device: cpu or cuda.
        python: that runs it.
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
    return Worker(WORKERS[way.who], job, variables, python)


def ahead(starts: Iterable[Callable[[], Worker]]) -> Iterator[Worker]:
    """The workers in turn, each while the next one is already importing."""
    waiting = None
    for one in starts:
        started = one()
        if waiting is not None:
            yield waiting
        waiting = started
    if waiting is not None:
        yield waiting


def measure(name: str, config: Path, length: int, way: Way, worker: Worker) -> Result:
    """Take steps, the first ones to warm up.

    Args:
        name: of the model.
        config: its `config.json`.
        length: of the conversations, in tokens.
        way: what the worker was started for.
        worker: that takes them.
    """
    cost = operations_per_token(config, length)
    try:
        with worker:
            steps = [worker.ask() for _ in range(STEPS)][WARM:]
            resolved = {key: worker.found[key] for key in RESOLVED if key in worker.found}
            return Result(name, way, resolved, cost, steps)
    except SystemExit as failure:
        said = str(failure)
        no_room = any(error in said for error in ("OutOfMemoryError", "UserError"))
        if way.who == "ours" and not no_room:
            raise
        return Result(name, way, {}, cost, [], None if no_room else said)


def make_inputs(config: Path, folder: Path, length: int, device: torch.device) -> None:
    """Write a random model, a tokenizer and conversations into a folder."""
    wanted = AutoConfig.from_pretrained(config)
    random_folder.write_conversations(folder / "data", [length] * BATCH * STEPS, wanted.vocab_size)
    random_folder.write_tokenizer(folder / "tokenizer")
    random_folder.write_model(wanted, folder / "model", device)


def peers(unsloth_python: str) -> dict[str, str]:
    """Those that are installed, each with the Python that has it."""
    present = {"trl": sys.executable} if importlib.util.find_spec("trl") else {}
    look = "import importlib.util, sys; sys.exit(not importlib.util.find_spec('unsloth'))"
    if subprocess.run([unsloth_python, "-c", look], check=False).returncode == 0:  # noqa: S603
        present["unsloth"] = unsloth_python
    return present


def measure_all(
    configs: Mapping[str, Path],
    caps_gib: Mapping[str, Sequence[int | None]],
    length: int,
    device: str,
    present: Mapping[str, str],
) -> Iterator[Result]:
    """Every way on every model, under a progress bar.

    Args:
        configs: of the models, by name.
        caps_gib: within how many GiB each is measured; None for all that there are.
        length: of the conversations, in tokens.
        device: cpu or cuda.
        present: the peers, each with its Python.
    """
    pythons = {"ours": sys.executable, **present}
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            make_inputs(config, folder, length, torch.device(device))
            tried = [way for cap in caps_gib[name] for way in ways(length, cap, present)]
            starts = (
                partial(start, way, folder, length, device, pythons[way.who]) for way in tried
            )
            with progress.bar(total=len(tried), desc=name, unit="way") as bar:
                for way, worker in zip(tried, ahead(starts), strict=True):
                    yield measure(name, config, length, way, worker)
                    bar.update()


def measured_before(but: Sequence[str], where: Mapping[str, Any]) -> list[Result]:
    """Results of other models on the same kind of machine, which stay."""
    found = files.read_json(RESULTS) if RESULTS.exists() else {"environment": None}
    if found["environment"] != where:
        return []
    return [result for result in results_of(found) if result.model not in but]


def main() -> None:
    """Measure, print, write; what was measured stays, whatever comes after it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--unsloth-python", default=sys.executable, help="an environment with it")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this machine has no CUDA device that torch can use")
    configs = {name: CONFIGS / f"{name}.json" for name in given.models}
    where = environment(torch.device("cuda", 0))
    results = measured_before(given.models, where)
    for result in measure_all(configs, CAPS_GIB, LENGTH, "cuda", peers(given.unsloth_python)):
        results.append(result)
        print(table([result]).splitlines()[-1], result.failure or "", flush=True)
        found = {"environment": where, "results": [asdict(one) for one in results]}
        files.write_json(RESULTS, found)
        put("training on a GPU", text(found))
        training_cuda_picture.draw(results)


if __name__ == "__main__":
    main()
