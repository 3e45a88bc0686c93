"""How the cost of a training step grows with the length, the rank and the size of the model.

Reads:  models/quantized; larger models are of random weights, made on the spot
Writes: benchmarks/results/growth.json, the table in docs/performance.md and its picture
Run:    python -m benchmarks.growth        (about ten minutes on two cores, nothing else running)

A step is one conversation of random tokens, half of them learnt, in one micro-batch and without
checkpointing: what is compared does not depend on what the plan would choose. Each point is a
process of its own; each step comes just after a measurement of the bf16 matrix rate, and the first
one is left out.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import growth_table, matrix_rate
from benchmarks.growth_table import Point
from benchmarks.paced import Worker
from benchmarks.training_data import require_model
from benchmarks.training_step import Setting
from stages.shared.architecture import model_of, model_of_config
from stages.shared.core import files, progress
from stages.shared.core.errors import run
from stages.shared.tensors import Model, parameter_count
from stages.train.environment import environment

WORKER = "benchmarks.growth_worker"
MODEL = Path("models/quantized")
STEPS = 4  # a point, the first of them to warm up
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
RANKS = (4, 16, 64, 256)
LENGTH, RANK, LENGTH_OF_MODELS = 1024, 16, 512  # where they are not what grows


def llama(hidden: int, inner: int, layers: int, heads: int, key_value_heads: int) -> dict[str, int]:
    """The sizes of a Llama with the default's vocabulary and a tied head."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    }


# 0.36, 0.68 and 1.07 billion parameters, heads of 64
LARGER = (llama(960, 2560, 32, 15, 5), llama(1536, 4096, 24, 24, 8), llama(2048, 8192, 16, 32, 8))


@dataclass(frozen=True)
class Job:
    """A point: what grows, and the step that is taken.

    Attributes:
        sweep: length, rank or parameters.
        model: a folder, or the sizes of a Llama.
        length: of the conversation, in tokens.
        rank: of the adapter.
    """

    sweep: str
    model: str | dict[str, int]
    length: int
    rank: int

    @property
    def described(self) -> Model:
        """The model, by its sizes."""
        if isinstance(self.model, str):
            return model_of_config(Path(self.model) / "config.json")
        with torch.device("meta"):
            return model_of(AutoModelForCausalLM.from_config(LlamaConfig(**self.model)))

    @property
    def value(self) -> int:
        """How much there is of what grows."""
        if self.sweep == "parameters":
            return parameter_count(self.described.tensors)
        return self.length if self.sweep == "length" else self.rank


def jobs(model: Path) -> list[Job]:
    """All points."""
    default = str(model.absolute())
    sizes: tuple[str | dict[str, int], ...] = (default, *LARGER)
    return [
        *(Job("length", default, length, RANK) for length in LENGTHS),
        *(Job("rank", default, LENGTH, rank) for rank in RANKS),
        *(Job("parameters", size, LENGTH_OF_MODELS, RANK) for size in sizes),
    ]


def measure(job: Job) -> Point:
    """Take the steps of a point, in a process of its own."""
    setting = Setting("nf4", job.rank, False, (job.length,))
    bound = matrix_rate.bound_operations(job.described, setting.tokens, setting.supervised_tokens)
    with Worker(WORKER, asdict(job) | {"steps": STEPS}) as worker:
        steps = [worker.ask() for _ in range(STEPS)]
        return Point(job.sweep, job.value, worker.found["before_bytes"], bound, steps)


def measure_all(wanted: list[Job]) -> Iterator[Point]:
    """Every point, under a progress bar."""
    with progress.bar(total=len(wanted), desc="growth", unit="point") as bar:
        for job in wanted:
            point = measure(job)
            print(point.line, flush=True)
            yield point
            bar.update()


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth")
    parser.add_argument("--model", type=Path, default=MODEL, help="a quantized model")
    parser.add_argument("--results", type=Path, default=growth_table.RESULTS)
    parser.add_argument("--no-page", action="store_true", help="leave docs/performance.md alone")
    given = parser.parse_args()
    require_model(given.model)
    found: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "points": [asdict(point) for point in measure_all(jobs(given.model))],
    }
    files.write_json(given.results, found)
    print(growth_table.text(found))
    if not given.no_page:
        growth_table.write(found)


if __name__ == "__main__":
    run(main)
