"""Adapters of every variant on a tiny model, and what they compute."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from stages.shared.model import loading
from stages.shared.step import adapter
from stages.shared.step.memory.setup import lora_of
from stages.shared.weights.precision import autocast
from tests import tiny
from tests.architectures import random
from tests.train.running import settings

CPU = torch.device("cpu")
IDS = torch.arange(3, 60)[None]
LORA = lora_of(settings().lora) | {"r": 16}
Gradients = dict[str, torch.Tensor]


def load(folder: Path, precision: str = "nf4", **lora: Any) -> Any:
    """A fresh adapter on the tiny model."""
    quantized = folder / precision
    if not quantized.exists():
        tiny.quantize(quantized, precision)
    params = settings(**{f"lora__{key}": value for key, value in lora.items()})
    torch.manual_seed(params.train.seed)
    return adapter.load_for_lora(quantized, params.lora, CPU, folder / "base")


def moved(folder: Path, device: torch.device = CPU) -> PeftModel:
    """An adapter whose B is not zero, or no gradient would reach A; in training mode."""
    torch.manual_seed(1)
    model = adapter.load_for_lora(folder, settings().lora, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


def gradients_of(model: torch.nn.Module) -> Gradients:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(one: Gradients, other: Gradients) -> float:
    """The largest relative distance of a gradient, by Frobenius norm."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / other[n].norm()) for n in other)


def layers(model: Any) -> dict[str, LoraLayer]:
    """By their names in the base."""
    named = model.get_base_model().named_modules()
    return {name: module for name, module in named if isinstance(module, LoraLayer)}


def update(layer: LoraLayer) -> torch.Tensor:
    """What the adapter adds to the matrix."""
    return layer.get_delta_weight("default").detach()


@torch.no_grad()
def logits(model: Any, dtype: torch.dtype) -> torch.Tensor:
    with autocast(CPU, dtype):
        return model.eval()(IDS).logits.float()


def exactly(folder: Path, model: Any, precision: str) -> torch.Tensor:
    """Logits of the adapter on dequantized weights, in fp32."""
    adapter.save(model, folder / "adapter", torch.bfloat16)
    dequantized = loading.load_dequantized(folder / precision, CPU)
    return logits(loading.attach(dequantized, folder / "adapter"), torch.float32)


def biased(folder: Path) -> Path:
    """A tiny model with LayerNorms, biases everywhere, and a tied head, in nf4."""
    model = random("starcoder2", {"sliding_window": None}).to(torch.bfloat16)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder / "base")
    tiny.quantize(folder / "nf4", "nf4")
    return folder
