"""Predicted memory against measurements.

Reads:  models/base (for the default's rows); all other models are random
Writes: the tables of docs/memory.md
Run:    python -m benchmarks.memory steps        82 real steps on this CPU and their counts
        python -m benchmarks.memory gpu          counts of GPU steps
        python -m benchmarks.memory mixtures     counts of steps of mixtures of experts

Measured is the peak of live bytes (`stages/shared/step/memory/live_bytes.py`) in the second of two
steps. The count runs in its own process, so the measurement does not include it.
"""

import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from benchmarks.common import BASE, MEMORY_PAGE, machine, publish
from stages.plan.config import CONFIGS
from stages.quantize.__main__ import Quantize
from stages.quantize.convert import convert
from stages.shared.core import display
from stages.shared.core.command import run
from stages.shared.model import loading, packing
from stages.shared.model.packing import Example
from stages.shared.parallel.group import Group
from stages.shared.parallel.placement import GIB
from stages.shared.parallel.shards import Shards
from stages.shared.step import adapter, gradient, optim
from stages.shared.step.config import Lora
from stages.shared.step.fused import patch
from stages.shared.step.memory import fit
from stages.shared.step.memory.fake_model import state_tensors
from stages.shared.step.memory.live_bytes import LiveBytes
from stages.shared.step.memory.predict import Prediction, StepCounter
from stages.shared.step.memory.setup import Device, TrainingSetup, micro_batch_of, setup_of
from stages.shared.step.router_loss import RouterLoss
from stages.shared.weights import precision

CPU = torch.device("cpu")
MAX_GRAD_NORM = 0.3
MEDIAN, WORST = 0.02, 0.05  # promised errors of live bytes
SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["num_key_value_heads", "vocab_size"]


def sizes(*values: int) -> dict[str, Any]:
    """Sizes of a model, as its config names them."""
    return dict(zip(SIZES, values, strict=True))


# Multi-head attention with biases; wide matrices and an untied head; a vocabulary larger than the
# blocks; blocks without fused functions.
MODELS: dict[str, PretrainedConfig] = {
    "whole heads": Qwen2Config(**sizes(192, 512, 6, 6, 6, 2000), tie_word_embeddings=True),
    "untied head": LlamaConfig(**sizes(512, 1792, 3, 16, 4, 4000), tie_word_embeddings=False),
    "large vocabulary": LlamaConfig(**sizes(128, 384, 3, 4, 1, 32000), tie_word_embeddings=True),
    "GPT-2": GPT2Config(n_embd=192, n_layer=5, n_head=6, vocab_size=3000),
    "Mixtral": MixtralConfig(**sizes(192, 384, 4, 6, 2, 3000), num_local_experts=4),
    "Gemma": GemmaConfig(**sizes(192, 768, 5, 4, 1, 3000), head_dim=64),
    "Qwen3": Qwen3Config(**sizes(192, 384, 4, 6, 2, 3000), head_dim=32),
    "Qwen3-MoE": Qwen3MoeConfig(
        **sizes(192, 384, 3, 6, 2, 3000), head_dim=32, num_experts=4, num_experts_per_tok=2
    ),
}
SHORT, MIDDLE, LONG = (32, 16), (90, 40, 120), (300, 200, 100)


@dataclass(frozen=True)
class Setting:
    """Training and execution of a step; `rank` is None for full fine-tuning."""

    precision: str
    rank: int | None
    checkpointed: bool
    lengths: tuple[int, ...]
    share: float = 0.5  # fraction of each conversation's tokens that are supervised, at its end
    optimizer: str = "adamw"
    double_quant: bool = True
    dropout: float = 0.0
    init: str = "default"
    dora: bool = False
    router_aux_loss: float | None = None

    @property
    def lora(self) -> Lora:
        """The section `lora`."""
        values = {"r": self.rank or 8, "alpha": 16.0, "dropout": self.dropout, "init": self.init}
        values |= {"target_modules": "all-linear", "modules_to_save": None, "bias": "none"}
        values |= {"experts": None, "rslora": False, "dora": self.dora}
        return Lora.model_validate(values)

    @property
    def train(self) -> Any:
        """The section `train`, as far as a step reads it."""
        values = {"optimizer": self.optimizer, "router_aux_loss": self.router_aux_loss}
        values |= {"method": "lora" if self.rank else "full"}
        return SimpleNamespace(**values, learning_rate=1e-4, weight_decay=0.0)

    @property
    def quantize(self) -> Quantize:
        """The section `quantize`."""
        values = {"precision": self.precision, "double_quant": self.double_quant}
        return Quantize.model_validate(values | {"compute_dtype": "bf16"})

    def setup(self, device: Device = "cpu") -> TrainingSetup:
        """Input of the count."""
        bf16 = precision.has_bf16_matmuls(device)
        setup = setup_of(self.quantize, self.lora, self.train, device, bf16=bf16)
        return replace(setup, gradient_checkpointing=self.checkpointed)

    def __str__(self) -> str:
        lora = f"rank {self.rank} on {self.precision}"
        words = [lora if self.rank else f"all weights, {self.precision}"]
        words += ["single"] * (self.precision in ("nf4", "fp4") and not self.double_quant)
        words += ["8-bit AdamW"] * (self.optimizer == "adamw_8bit") + ["DoRA"] * self.dora
        return ", ".join([*words, *(["checkpointed"] * self.checkpointed)])


def random_base(config: PretrainedConfig, folder: Path) -> Path:
    """Write a model with random bf16 weights, as `fetch_model` would."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def micro_batch(setting: Setting, vocabulary: int) -> list[Example]:
    """Conversations of random tokens; each has one more token, as a target only."""
    random = np.random.default_rng(0)
    examples = []
    for row, length in enumerate(setting.lengths):
        targets = min(length - 1, max(1, round(length * setting.share)))
        mask = np.arange(length + 1) > length - targets
        examples.append(Example(random.integers(0, vocabulary, length + 1), mask, row))
    [packed] = packing.bins(examples, sum(setting.lengths))
    return packed


class LiveShards(LiveBytes):
    """Live bytes with the buffers of shards, whose storage is resized."""

    def __init__(self, held: Iterable[torch.Tensor], buffers: Sequence[torch.Tensor]) -> None:
        self._buffers, self._most = buffers, 0
        own = {buffer.untyped_storage()._cdata for buffer in buffers}
        super().__init__(x for x in held if x.untyped_storage()._cdata not in own)
        self._alive |= own

    @property
    def peak_bytes(self) -> int:
        """The most that was alive, gathered weights included."""
        return self._most

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        gathered = sum(buffer.untyped_storage().nbytes() for buffer in self._buffers)
        self._most = max(self._most, self.total + gathered)
        return result


def quantized(base: Path, setting: Setting) -> Path:
    """The model as `quantize` writes it, made once."""
    folder = base.with_name(f"{base.name}-{setting.precision}-{setting.double_quant}")
    if not folder.exists():
        folder.mkdir()
        convert(base, folder, setting.quantize, CPU)
    return folder


def measure(base: Path, setting: Setting, group: Group | None = None) -> int:
    """Peak of live bytes in the second of two steps, of two micro-batches each.

    Quantized models are kept next to `base`. In a `group` the weights are sharded.
    """
    folder = quantized(base, setting)
    if setting.rank:
        model: Any = adapter.load_for_lora(folder, setting.lora, CPU)
    else:
        model = adapter.load_for_full(folder, CPU, on_cpu=group is not None)
    with StepCounter(base / "config.json") as counter:
        fused = counter.persistent(setting.setup())["unfused_because"] is None
    if fused:
        patch.fuse(model)
    shards = Shards(model, group, CPU, trained=not setting.rank) if group else None
    divided, parts = (shards.matrices, shards.trained) if shards else ((), [])
    if setting.checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.train().parameters() if p.requires_grad and p not in divided]
    optimizer = optim.make_optimizer([*trained, *parts], setting.train, CPU)
    base_model: Any = loading.without_adapter(model)
    examples = micro_batch(setting, base_model.config.vocab_size)
    weight = setting.router_aux_loss
    options: Any = {"dtype": loading.compute_dtype(folder, CPU), "fused": fused}
    options |= {"scaler": torch.amp.GradScaler("cpu", enabled=False), "scattered": divided}
    options |= {"router": RouterLoss(model, weight) if weight else None}

    def step() -> None:
        for _ in range(2):
            gradient.accumulate(model, [examples], 2 * len(examples), **options)
        gradient.clip(trained, parts, MAX_GRAD_NORM, (group or Group()).all_reduce)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    states = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    held = [*model.parameters(), *model.buffers(), *states, *state_tensors(model)]
    held += [unit.shard for unit in shards.units] if shards else []
    with LiveShards(held, shards.buffers) if shards else LiveBytes(held) as live:
        step()
    return live.peak_bytes


def predict(config: Path, setting: Setting, device: Device = "cpu", shards: int = 1) -> Prediction:
    """Count of a setting's step."""
    batch = micro_batch_of(micro_batch(setting, 2))
    with StepCounter(config) as counter:
        return counter.predict(setting.setup(device), batch, shards)


def settings() -> Iterator[tuple[str, Setting]]:
    """Model and setting of each measured step."""
    both = (False, True)
    for model in list(MODELS)[:3]:
        for kind, on in product(("nf4", "fp4", "int8", "bf16", "fp32"), both):
            yield model, Setting(kind, 8, on, MIDDLE)
        for kind, on in product(("bf16", "fp32"), both):
            yield model, Setting(kind, None, on, MIDDLE)
        for lengths, on in product((SHORT, LONG), both):
            yield model, Setting("nf4", 8, on, lengths)
        yield model, Setting("nf4", 64, True, SHORT, double_quant=False)
        yield model, Setting("nf4", 64, False, SHORT, optimizer="adamw_8bit")
        yield model, Setting("int8", 8, True, LONG)
    for model, on in product(list(MODELS)[3:], both):
        yield model, Setting("nf4" if model != "GPT-2" else "bf16", 8, on, MIDDLE)
    yield "whole heads", Setting("nf4", 8, False, MIDDLE, dora=True)
    yield "whole heads", Setting("nf4", 8, True, MIDDLE, dropout=0.1)
    if BASE.is_dir():
        for kind, rank, on, lengths in (
            ("nf4", 8, True, (128, 128)),
            ("nf4", 16, False, (256, 256)),
            ("fp4", 8, True, (64,)),
            ("int8", 8, False, (64,)),
            ("bf16", 8, True, (64,)),
            ("bf16", None, True, (64,)),
            ("fp32", None, False, (32,)),
        ):
            yield "default", Setting(kind, rank, on, lengths)


def measure_steps() -> None:
    """Real steps on this CPU; an error if predictions are worse than promised."""
    rows, errors, steps = [], [], list(settings())
    with (
        tempfile.TemporaryDirectory() as work,
        StepCounter(CONFIGS / "Llama-3-8B.json"),  # one process counts for all
        display.bar(total=len(steps), desc="memory", unit="step") as bar,
    ):
        for name, setting in steps:
            base = Path(work) / name
            if not base.exists() and name == "default":
                base.symlink_to(BASE)
            elif not base.exists():
                random_base(MODELS[name], base)
            measured, peak = measure(base, setting), predict(base / "config.json", setting)
            errors.append(peak.total_bytes / measured - 1)
            rows.append(
                {
                    "model": name,
                    "trained": str(setting),
                    "tokens": sum(setting.lengths),
                    "measured, MB": f"{measured / 1e6:.1f}",
                    "predicted": f"{peak.total_bytes / 1e6:.1f}",
                    "error": f"{errors[-1]:+.2%}",
                    "peak": peak.phase,
                }
            )
            bar.update()
    absolute = pd.Series(errors).abs()
    summary = (
        f"{len(rows)} steps: median error {absolute.median():.3%}, from {min(errors):+.2%} to "
        f"{max(errors):+.2%}. {machine()}"
    )
    publish("measured", pd.DataFrame(rows), summary, MEMORY_PAGE)
    if absolute.median() > MEDIAN or absolute.max() > WORST:
        sys.exit(f"error: promised were a median error of {MEDIAN:.0%} and {WORST:.0%} at the most")


def count_gpu() -> None:
    """Counts of GPU steps at the size of real models."""
    names = ("Qwen1.5-0.5B", "Llama-2-7B", "Mistral-7B", "Llama-3-8B", "Llama-3-70B")
    shapes = ((2048,) * 4, False), ((2048,) * 4, True), ((512, 300), False), ((32_768,), True)
    rows = []
    for name, (lengths, on) in product(names, shapes):
        setting = Setting("nf4", 16, on, lengths, share=1.0)
        peak = predict(CONFIGS / f"{name}.json", setting, "cuda")
        size = f"{peak.total_bytes / GIB:.2f}"
        rows.append((name, "yes" if on else "no", f"{sum(lengths):,}", size, peak.phase))
    columns = ["model", "checkpointed", "tokens", "counted, GiB", "peak"]
    publish("a GPU's steps", pd.DataFrame(rows, columns=columns), "Rank 16 on nf4.", MEMORY_PAGE)


def count_mixtures() -> None:
    """Sizes of mixtures, and counts of their QLoRA steps of 2,048 tokens on a GPU."""
    rows = []
    for name in ("Mixtral-8x7B", "Qwen3-30B-A3B", "gpt-oss-20b"):
        with StepCounter(CONFIGS / f"{name}.json") as counter:
            sizes = counter.model()["parameters"]
            total, active = (f"{sizes[key] / 1e9:.2f}" for key in ("parameters", "active"))
            for rank, on in ((16, True), (16, False), (4, True)):
                setting = Setting("nf4", rank, on, (2048,), share=1.0)
                setup = setting.setup("cuda")
                peak = counter.predict(setup, micro_batch_of(micro_batch(setting, 2)))
                size = fit.device_bytes(counter, setup, peak) / GIB
                card = next((str(gib) for gib in (24, 32, 40, 48, 80) if size <= gib), "none")
                trained = f"{counter.persistent(setup)['trainable'] / 1e6:.0f}"
                how = "yes" if on else "no"
                rows.append((name, total, active, rank, trained, how, f"{size:.1f}", card))
    columns = ["model", "10⁹ parameters", "active", "rank", "10⁶ trained", "checkpointed"]
    columns += ["device, GiB", "card, GiB"]
    table = pd.DataFrame(rows, columns=columns)
    publish("mixtures", table, "nf4 with double quantization, 2,048 tokens.", MEMORY_PAGE)


BENCHMARKS = {
    "steps": measure_steps,
    "gpu": count_gpu,
    "mixtures": count_mixtures,
}


def add_options(parser: ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("benchmark", choices=list(BENCHMARKS))


def main(options: Namespace) -> None:
    """Measure, publish."""
    BENCHMARKS[options.benchmark]()


if __name__ == "__main__":
    run(main, add_options)
