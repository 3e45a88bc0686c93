"""Training steps of mixtures of experts on a CPU, against the library's and those of dense models.

Random models, steps in turn in one process, medians. `ours`: this project on NF4, and in bf16.
`library`: the fused experts of transformers in bf16, with the adapter that peft makes of
`all-linear`: on the router too, and of twice the rank where gate and up are one; it dequantizes
nothing. `dense`: this project on NF4, a Qwen3 with as many parameters as a token uses.

Writes: a table in docs/benchmarks.md
Run:    python -m benchmarks.mixtures
"""

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
DTYPE = precision.compute_dtype(torch.bfloat16, "cpu")
LIBRARY = "library, bf16"
RANK, LENGTHS, VOCABULARY = 8, (512, 512), 1024
SCALER = torch.amp.GradScaler("cpu", enabled=False)
# hidden, width of an expert, experts, experts a token, blocks, heads. The second is a block of
# OLMoE-1B-7B's shape: 16 of them have a billion active parameters.
SIZES = {"tiny": (256, 128, 16, 4, 4, 4), "1B active, one block": (2048, 1024, 64, 8, 1, 16)}


def configs(size: str) -> tuple[PretrainedConfig, PretrainedConfig]:
    """The mixture, and the dense model of the same active parameters."""
    hidden, width, experts, each, layers, heads = SIZES[size]
    shared: dict[str, Any] = {"hidden_size": hidden, "num_hidden_layers": layers, "head_dim": 64}
    shared |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": VOCABULARY}
    mixture = {"moe_intermediate_size": width, "num_experts": experts, "num_experts_per_tok": each}
    return Qwen3MoeConfig(**shared | mixture), Qwen3Config(**shared, intermediate_size=width * each)


def ours(base: Path, kind: str) -> Callable[[], None]:
    """Gradient of a micro-batch, by the stages' own functions."""
    setting = Setting(kind, RANK, False, LENGTHS)
    (folder := base.with_name(f"{base.name}-{kind}")).mkdir()
    convert(base, folder, setting.quantize, CPU)
    model: Any = adapter.load_for_lora(folder, setting.lora, CPU)
    fuse(model.train())
    examples = micro_batch(setting, VOCABULARY)
    weight = sum(example.supervised_tokens for example in examples)

    def step() -> None:
        model.zero_grad()
        gradient.accumulate(model, [examples], weight, dtype=DTYPE, fused=True, scaler=SCALER)

    return step


def library(base: Path) -> Callable[[], None]:
    """The same of transformers and peft, which pad nothing either: one row, with its positions."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    batch = packing.pack(micro_batch(Setting("bf16", RANK, False, LENGTHS), VOCABULARY), CPU)
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}

    def step() -> None:
        model.zero_grad()
        with precision.autocast(CPU, DTYPE):
            logits = model(**inputs, logits_to_keep=batch.predictors).logits[0]
        torch.nn.functional.cross_entropy(logits.float(), batch.targets).backward()

    return step


def compare(size: str, rounds: int) -> pd.DataFrame:
    """Rows of the table for one size: median seconds of steps in turn."""
    mixture, dense = configs(size)
    with tempfile.TemporaryDirectory() as folder:
        base = random_base(mixture, Path(folder) / "mixture")
        steps = {
            "ours, nf4": ours(base, "nf4"),
            "ours, bf16": ours(base, "bf16"),
            LIBRARY: library(base),
            "dense, nf4": ours(random_base(dense, Path(folder) / "dense"), "nf4"),
        }
    taken: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(1 + rounds):  # the first is not counted
        for who, step in steps.items():
            started = time.perf_counter()
            step()
            taken[who].append(time.perf_counter() - started)
    seconds = pd.DataFrame(taken)[1:].median()
    columns = {
        "model": size,
        "who": seconds.index,
        "tokens/s": (sum(LENGTHS) / seconds).map("{:,.0f}".format),
        "times the library's": (seconds[LIBRARY] / seconds).map("{:.2f}".format),
        "steps": str(rounds),
    }
    return pd.DataFrame(columns)


def add_options(parser: ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))


def main(options: Namespace) -> None:
    """Measure, publish."""
    tables = [compare(size, options.rounds) for size in options.sizes]
    publish("mixtures", pd.concat(tables), machine())


if __name__ == "__main__":
    run(main, add_options)
