"""Our training step beside that of `trl`'s `SFTTrainer`: the same model, rows and rank, in turn.

Reads:  models/quantized, models/tokenizer; data/sample, and ../shared/data/conversations if there
Writes: benchmarks/results/training.json, the table in docs/performance.md and its picture;
        a CPU without bf16, on which both compute in fp32, has a file, table and picture of its own
Run:    make bench
        python -m benchmarks.training --minutes 20      (where `trl` and `datasets` are installed)

Two processes live on through a comparison, ours and the peer's, and take steps in turn (A B A B),
each on the same conversations, each just after a measurement of the machine's matrix rate. The
first step of each is left out of the figures, and its two losses must agree within 1 %. The peer
unpacks or packs, and its size of a micro-batch is the fastest of those tried; both allocators are
preloaded for both. Nothing else should run on the machine.
"""

import argparse
import ctypes.util
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import matrix_rate, training_data, training_table
from benchmarks.paced import Worker
from benchmarks.training_data import Inputs
from benchmarks.training_figures import Comparison, Tried, best, middle
from stages.shared.architecture import model_of_config
from stages.shared.core import files, progress
from stages.shared.core.errors import UserError, run
from stages.shared.precision import multiplies_bf16
from stages.train.environment import environment

OURS, PEER = "benchmarks.training_ours", "benchmarks.training_trl"
MODEL, TOKENIZER = Path("models/quantized"), Path("models/tokenizer")
MICRO_BATCHES = (1, 2, 4, 8)  # that the peer is tried with, in this order
SLOWER = 0.9  # of the fastest so far: larger ones, which need longer yet, are not tried
TRIED = 3  # steps with each
ROUNDS = 4  # at least, the first of them to warm up
LONGER = {"sample": 1, "real": 3}  # how much of the time a comparison gets, beside the others
LOSS_TOLERANCE = 0.01
# Of ours, noted.
RESOLVED = ("micro_batch_tokens", "gradient_checkpointing", "unfused_because", "workers")


def allocators() -> dict[str, dict[str, str]]:
    """The environment of each allocator that is here: the C library's own, and jemalloc."""
    found = {"stock": {"LD_PRELOAD": "", "QLORA_DEVICE": "cpu"}}
    library = ctypes.util.find_library("jemalloc")
    if library:
        found["jemalloc"] = found["stock"] | {"LD_PRELOAD": library}
    return found


def peer_job(inputs: Inputs, micro_batch: int | None) -> dict[str, Any]:
    """What the peer is told: the size of its micro-batch, or None to pack."""
    packed = inputs.tokens if micro_batch is None else None
    return {**inputs.job, "micro_batch": micro_batch, "pack_tokens": packed}


def try_micro_batches(inputs: Inputs, environment_: Mapping[str, str]) -> Iterator[Tried]:
    """Steps of the peer, unpacked, at each size of a micro-batch: after one to warm up, the median.

    A single step just after a probe that the machine spoiled would choose the wrong size. The
    larger it is, the more is padding, while products gain less and less: the first size that is
    clearly slower is the last.
    """
    fastest = 0.0
    for size in MICRO_BATCHES:
        with Worker(PEER, peer_job(inputs, size), environment_) as peer:
            peer.ask()
            tried = middle(Tried(inputs.name, size, peer.ask()) for _ in range(TRIED))
        yield tried
        if tried.tokens_per_product < SLOWER * fastest:
            return
        fastest = max(fastest, tried.tokens_per_product)


def compare(
    inputs: Inputs,
    allocator: str,
    environment_: Mapping[str, str],
    micro_batch: int | None,
    deadline: float,
) -> Comparison:
    """Steps in turn until the deadline, by `time.monotonic`.

    Raises:
        SystemExit: the two did not do the same work.
    """
    model = model_of_config(Path(inputs.job["model"]) / "config.json")
    with (
        Worker(PEER, peer_job(inputs, micro_batch), environment_) as peer,
        Worker(OURS, {**inputs.job, "steps": peer.found["steps"]}, environment_) as ours,
    ):
        done = Comparison(
            inputs.name,
            allocator,
            micro_batch,
            None if micro_batch else inputs.tokens,
            {"ours": ours.found["before_bytes"], "peer": peer.found["before_bytes"]},
            {name: ours.found[name] for name in RESOLVED},
            [],
        )
        for _ in peer.found["steps"]:
            one = {"ours": ours.ask(), "peer": peer.ask()}
            tokens, supervised = one["ours"]["input_tokens"], one["ours"]["supervised_tokens"]
            bound = matrix_rate.bound_operations(model, tokens, supervised)
            done.rounds.append({**one, "bound_operations": bound})
            require_same_work(done)
            if len(done.rounds) >= ROUNDS and time.monotonic() > deadline:
                break
    return done


def require_same_work(done: Comparison) -> None:
    """See that the last round of both was on the same tokens, and the first at the same loss.

    Raises:
        SystemExit: it was not.
    """
    ours, peer = done.rounds[-1]["ours"], done.rounds[-1]["peer"]
    for name in ("tokens", "supervised_tokens"):
        if ours[name] != peer[name]:
            sys.exit(f"error: {done.name}: {name} are {ours[name]} of ours, {peer[name]} of trl's")
    first, second = done.rounds[0]["ours"]["loss"], done.rounds[0]["peer"]["loss"]
    if abs(first - second) > LOSS_TOLERANCE * second:
        sys.exit(f"error: {done.name}: the first loss is {first:.4f}, and {second:.4f} with trl")


def measure(
    every: Mapping[str, Inputs], preloaded: Mapping[str, Mapping[str, str]], deadline: float
) -> tuple[list[Tried], list[Comparison]]:
    """Find the peer's best micro-batch on each set of conversations, then compare all there is."""
    tried: list[Tried] = []
    wanted = list(product(every.values(), preloaded, (False, True)))
    compared = []
    with progress.bar(total=len(every) + len(wanted), desc="training", unit="run") as bar:
        for inputs in every.values():
            for one in try_micro_batches(inputs, preloaded["stock"]):
                tried.append(one)
                print(one.line, flush=True)
            bar.update()
        for index, (inputs, allocator, packed) in enumerate(wanted):
            share = LONGER[inputs.name] / sum(LONGER[left.name] for left, *_ in wanted[index:])
            until = time.monotonic() + share * (deadline - time.monotonic())
            size = None if packed else best(tried, inputs.name)
            compared.append(compare(inputs, allocator, preloaded[allocator], size, until))
            print(compared[-1].line, flush=True)
            bar.update()
    return tried, compared


def main() -> None:
    """Prepare, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training")
    parser.add_argument("--minutes", type=float, default=20.0, help="for all of it")
    parser.add_argument("--model", type=Path, default=MODEL, help="a quantized model")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--results", type=Path, help="another file than the committed one")
    parser.add_argument("--no-page", action="store_true", help="leave docs/performance.md alone")
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    training_data.require_model(given.model, given.tokenizer)
    model, tokenizer = given.model.absolute(), given.tokenizer.absolute()
    try:
        peer = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("trl is not installed here; `make bench` sets up all it needs") from None
    computed_in = "bf16" if multiplies_bf16("cpu") else "fp32"
    preloaded = allocators()
    if "jemalloc" not in preloaded:
        print("no libjemalloc on this machine: only the C library's allocator is compared")
    with tempfile.TemporaryDirectory() as work:
        every = {}
        for name, source in training_data.sources().items():
            folder = training_data.prepared(source, tokenizer, Path(work) / name)
            every[name] = training_data.inputs_of(name, folder, model, tokenizer)
        for name in training_data.SOURCES.keys() - every.keys():
            print(f"{training_data.SOURCES[name]}: not there, left out")
        tried, compared = measure(every, preloaded, deadline)
    found = {
        "trl": peer,
        "computed_in": computed_in,
        "environment": environment(torch.device("cpu")),
        "tried": [asdict(one) for one in tried],
        "compared": [asdict(one) for one in compared],
    }
    files.write_json(given.results or training_table.PLACES[computed_in].results, found)
    print(training_table.text(found))
    if not given.no_page:
        training_table.write(found)


if __name__ == "__main__":
    run(main)
