"""Predicted against measured memory of real training steps on a CPU.

Reads:  models/base; three small models of other shapes are made on the spot
Writes: docs/pictures/memory.svg, and the table in docs/memory.md
Run:    python -m benchmarks.memory

Two minutes on two cores. What is measured is the peak of live tensor storage
(`benchmarks.live_memory`) in the second of two steps; weights and tokens do not matter to it, so
the small models are random.
"""

import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks import memory_table
from benchmarks.training_step import (
    Measured,
    Setting,
    in_precision,
    measure,
    micro_batch,
    random_base,
)
from stages.shared import peak
from stages.shared.architecture import model_of_config
from stages.shared.core import progress
from stages.shared.memory import Precision
from stages.shared.model import packing
from stages.shared.peak import Prediction
from stages.shared.step.adapter_sizes import Adapter, adapter_of
from stages.shared.tensors import Model
from stages.shared.tuning import Device, Tuning
from stages.shared.weights import precision
from stages.shared.workspace import micro_batch_of

BASE = Path("models/base")
CPU = torch.device("cpu")
RANK = 8

# Other shapes than the default's (grouped heads, tied head, 49,152 tokens): every head with keys of
# its own and biases; an untied head and wide matrices; a vocabulary that outweighs the blocks.
SMALL: dict[str, PretrainedConfig] = {
    "whole heads": Qwen2Config(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=2000,
        tie_word_embeddings=True,
    ),
    "untied head": LlamaConfig(
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=4000,
        tie_word_embeddings=False,
    ),
    "large vocabulary": LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=32000,
        tie_word_embeddings=True,
    ),
}
SHORT, MIDDLE, LONG = (32, 16), (90, 40, 120), (300, 200, 100)
LORA: tuple[Precision, ...] = ("nf4", "fp4", "int8", "bf16", "fp32")
FULL: tuple[Precision, ...] = ("bf16", "fp32")


@dataclass(frozen=True)
class Row:
    """One setting: what was predicted, and what was measured."""

    model: str
    setting: Setting
    predicted: Prediction
    measured: Measured

    @property
    def error(self) -> float:
        """(predicted - measured) / measured; below zero is too low."""
        return self.predicted.total_bytes / self.measured.peak_bytes - 1


def settings() -> Iterator[tuple[str, Setting]]:
    """What is measured, a model after the other; each is compared at every precision."""
    for model in SMALL:
        for kind, on in product(LORA, (False, True)):
            yield model, Setting(kind, RANK, on, MIDDLE)
        for kind, on in product(FULL, (False, True)):
            yield model, Setting(kind, None, on, MIDDLE)
        for lengths, on in product((SHORT, LONG), (False, True)):
            yield model, Setting("nf4", RANK, on, lengths)
        yield model, Setting("nf4", 64, False, MIDDLE)
        yield model, Setting("nf4", 64, True, SHORT, double_quant=False)
        yield model, Setting("nf4", 64, False, SHORT, optimizer="adamw_8bit")
        yield model, Setting("int8", RANK, True, LONG)
    for rank, on in product((RANK, 64), (False, True)):
        yield "default", Setting("nf4", rank, on, (128, 128))
    for lengths in ((64,), (256, 256)):
        yield "default", Setting("nf4", 16, False, lengths)
    yield "default", Setting("fp4", RANK, True, (64,))
    yield "default", Setting("int8", RANK, False, (64,))
    yield "default", Setting("bf16", RANK, True, (64,))
    yield "default", Setting("fp32", RANK, False, (64,))
    yield "default", Setting("bf16", None, True, (64,))
    yield "default", Setting("fp32", None, False, (32,))


def tuning_of(setting: Setting, adapter: Adapter | None, device: Device) -> Tuning:
    """A setting as the planner takes it."""
    return Tuning(
        setting.precision,
        adapter,
        double_quant=setting.double_quant,
        optimizer=setting.optimizer,
        gradient_checkpointing=setting.gradient_checkpointing,
        dropout=setting.dropout > 0,
        fusing=setting.fusing,
        device=device,
        bf16=precision.has_bf16_matmuls(device),
    )


def predict(model: Model, setting: Setting, device: Device = "cpu") -> Prediction:
    """What the planner says of a setting."""
    adapter = adapter_of(model.tensors, rank=setting.rank) if setting.rank else None
    [together] = packing.bins(micro_batch(setting, 2), setting.tokens)
    batch = micro_batch_of(together)
    return peak.predict(model, tuning_of(setting, adapter, device), batch)


def measured_row(name: str, base: Path, setting: Setting) -> Row:
    """Predict, then measure.

    Args:
        name: of the model.
        base: its folder; folders of the precisions are made beside it.
        setting: what to measure.
    """
    model = model_of_config(base / "config.json")
    kind = f"{setting.precision}-{'double' if setting.double_quant else 'single'}"
    folder = in_precision(base, base.with_name(f"{base.name}-{kind}"), setting, CPU)
    return Row(name, setting, predict(model, setting), measure(folder, setting, CPU))


def measure_all(work: Path) -> list[Row]:
    """All settings, under a progress bar; models are made below `work`."""
    bases = {name: random_base(config, work / name) for name, config in SMALL.items()}
    (work / "default").symlink_to(BASE.resolve())
    bases["default"] = work / "default"
    wanted = list(settings())
    rows = []
    with progress.bar(total=len(wanted), desc="memory", unit="setting") as bar:
        for name, setting in wanted:
            rows.append(measured_row(name, bases[name], setting))
            bar.update()
    return rows


def main() -> None:
    """Measure, print, draw; fail where the planner is off by more than it promises."""
    with tempfile.TemporaryDirectory() as work:
        rows = measure_all(Path(work))
    errors = [row.error for row in rows]
    table = memory_table.table(rows)
    print(table)
    memory_table.write(rows, table)
    worst, lowest = max(errors, key=abs), min(errors)
    median = statistics.median(map(abs, errors))
    if median > 0.02 or abs(worst) > 0.08 or lowest < -0.03:
        sys.exit("error: promised were a median error of 2 %, none above 8 %, none below -3 %")


if __name__ == "__main__":
    main()
