"""How far the gradients of a step in bf16 are from those in fp32: the fused step's, the modules'.

Reads:  models/quantized, data/prepared/train.parquet
Run:    python -m benchmarks.gradients [--rows 8] [--data data/prepared/train.parquet]

Two to three minutes on two cores. The same 4-bit weights are multiplied with in fp32 and in bf16;
the distance is that of all gradients together, by Frobenius norm, relative to fp32's.
Its factor B starts as small random numbers and not at zero, or no gradient would reach A.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel

from benchmarks.training_step import Setting, load
from stages.shared import packing, scoring
from stages.shared.core.errors import UserError, run
from stages.shared.examples import Example, read_examples
from stages.shared.precision import autocast, multiplies_bf16
from stages.shared.step.fused import patch as fused

CPU = torch.device("cpu")
MODEL = Path("models/quantized")
TOKENS = 1024  # of a micro-batch
Gradients = dict[str, torch.Tensor]


def adapted(folder: Path) -> PeftModel:
    """The model under a rank-16 adapter, drawn by a fixed seed."""
    torch.manual_seed(0)
    model = load(folder, Setting("nf4", 16, False, (1,)), CPU)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def widened(model: PeftModel) -> PeftModel:
    """The same in fp32 all through, its 4-bit weights dequantized to fp32."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            module.compute_dtype = weight.quant_state.dtype = torch.float32
    return model.float()


def gradients(
    model: PeftModel, examples: Sequence[Example], likelihoods: Any, dtype: torch.dtype
) -> Gradients:
    """Of the summed loss, by the parameter's name, fp32."""
    for micro_batch in packing.split(examples, TOKENS):
        with autocast(CPU, dtype):
            losses = likelihoods.negative_log_likelihoods(model, packing.pack(micro_batch, CPU))
        losses.sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def distance(found: Gradients, truth: Gradients) -> float:
    """Relative, of all of them together."""
    apart = sum(float((found[n] - truth[n]).square().sum()) for n in truth)
    return (apart / sum(float(g.square().sum()) for g in truth.values())) ** 0.5


def compare(folder: Path, examples: Sequence[Example]) -> dict[str, float]:
    """Both paths' distance from fp32."""
    truth = gradients(widened(adapted(folder)), examples, scoring, torch.float32)
    plain = gradients(adapted(folder), examples, scoring, torch.bfloat16)
    model = adapted(folder)
    fused.fuse(model)
    ours = gradients(model, examples, fused, torch.bfloat16)
    return {"modules": distance(plain, truth), "fused": distance(ours, truth)}


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--data", type=Path, default=Path("data/prepared/train.parquet"))
    asked = parser.parse_args()
    if not multiplies_bf16(CPU.type):
        raise UserError("this CPU has no products of bf16, and training computes in fp32 on it")
    examples = read_examples(asked.data)[: asked.rows]
    for path, apart in compare(MODEL, examples).items():
        print(f"{path:8} {apart:.2%} from fp32, {sum(map(len, examples)):,} tokens")


if __name__ == "__main__":
    run(main)
