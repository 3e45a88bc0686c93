"""Training steps of mixtures against the library's path in bf16, and dense models as large.

Random models, steps in turn in one process, medians. `ours`: this project on NF4, and in bf16.
`library`: the fused experts of transformers in bf16, with the adapter that peft makes of
`all-linear`: on the router too, and of twice the rank where gate and up are one; it dequantizes
nothing. `dense`: this project on NF4, a Qwen3 with as many parameters as a token uses.
"""

import gc
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from benchmarks.common import machine, publish
from benchmarks.memory import Setting, micro_batch, random_base
from stages.quantize.convert import convert
from stages.shared.core.command import run
from stages.shared.model import packing
from stages.shared.step import adapter, gradient
from stages.shared.step.fused.patch import fuse
from stages.shared.weights import precision

CPU = torch.device("cpu")
RANK = 8
SCALER = torch.amp.GradScaler("cpu", enabled=False)
# hidden, width of an expert, experts, experts a token, blocks, heads. The second is a block of
# OLMoE-1B-7B's shape: 16 of them have a billion active parameters.
SIZES = {"tiny": (256, 128, 16, 4, 4, 4), "1B active, one block": (2048, 1024, 64, 8, 1, 16)}

Step = Callable[[], None]


def configs(
    hidden: int, width: int, experts: int, each: int, layers: int, heads: int
) -> tuple[PretrainedConfig, PretrainedConfig]:
    """The mixture, and the dense model of the same active parameters."""
    shared: dict[str, Any] = {"hidden_size": hidden, "num_hidden_layers": layers, "head_dim": 64}
    shared |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 1024}
    mixture = {"moe_intermediate_size": width, "num_experts": experts, "num_experts_per_tok": each}
    return Qwen3MoeConfig(**shared | mixture), Qwen3Config(**shared, intermediate_size=width * each)


def ours(base: Path, setting: Setting, dtype: torch.dtype) -> Step:
    """Gradient of a micro-batch, by the stages' own functions."""
    folder = base.with_name(f"{base.name}-{setting.precision}")
    folder.mkdir()
    convert(base, folder, setting.quantize, CPU)
    model: Any = adapter.load_for_lora(folder, setting.lora, CPU)
    fuse(model.train())
    examples = micro_batch(setting, model.config.vocab_size)
    weight = sum(example.supervised_tokens for example in examples)

    def step() -> None:
        model.zero_grad()
        gradient.accumulate(model, [examples], weight, dtype=dtype, fused=True, scaler=SCALER)

    return step


def library(base: Path, setting: Setting, dtype: torch.dtype) -> Step:
    """The same of transformers and peft, which pad nothing either: one row, with its positions."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    batch = packing.pack(micro_batch(setting, model.config.vocab_size), CPU)

    def step() -> None:
        model.zero_grad()
        with precision.autocast(CPU, dtype):
            logits = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                logits_to_keep=batch.predictors,
            ).logits[0]
        torch.nn.functional.cross_entropy(logits.float(), batch.targets).backward()

    return step


def compare(name: str, lengths: tuple[int, ...], rounds: int) -> list[dict[str, str]]:
    """Rows of the table for one size."""
    dtype = precision.compute_dtype(torch.bfloat16, "cpu")
    mixture, dense = configs(*SIZES[name])
    nf4, bf16 = (Setting(kind, RANK, False, lengths) for kind in ("nf4", "bf16"))
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = random_base(mixture, Path(folder) / "mixture")
        steps = {
            "ours, nf4": ours(base, nf4, dtype),
            "ours, bf16": ours(base, bf16, dtype),
            "library, bf16": library(base, bf16, dtype),
            "dense, nf4": ours(random_base(dense, Path(folder) / "dense"), nf4, dtype),
        }
        for step in steps.values():
            step()
        for _ in range(rounds):
            for who, step in steps.items():
                started = time.perf_counter()
                step()
                rows.setdefault(who, []).append(time.perf_counter() - started)
        steps.clear()
    gc.collect()
    seconds = {who: statistics.median(times) for who, times in rows.items()}
    return [
        {
            "model": name,
            "who": who,
            "tokens/s": f"{sum(lengths) / taken:,.0f}",
            "times the library's": f"{seconds['library, bf16'] / taken:.2f}",
            "steps": str(rounds),
        }
        for who, taken in seconds.items()
    ]


def add_options(parser: ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each")
    parser.add_argument("--tokens", type=int, default=1024, help="of two conversations together")
    parser.add_argument("--only", choices=SIZES, help="one size")


def main(options: Namespace) -> None:
    """Measure, publish."""
    lengths = (options.tokens // 2, options.tokens - options.tokens // 2)
    names = [options.only] if options.only else list(SIZES)
    rows = [row for name in names for row in compare(name, lengths, options.rounds)]
    publish("mixtures", pd.DataFrame(rows), machine())


if __name__ == "__main__":
    run(main, add_options)
