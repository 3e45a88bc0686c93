"""Initialisation of LoRA weights on a base that stays as it is quantized: PiSSA, OLoRA, LoftQ.

PiSSA and OLoRA start at a principal part s·B₀·A₀ of each weight W. As published (and in peft) they
take it out of W, which would have to be quantized again. Here a frozen initialisation is subtracted
in the adapter: W + s·(B·A − B₀·A₀) begins at W. [B, −B₀]·[A; A₀] is an ordinary LoRA adapter of
twice the rank: so it is evaluated, saved and merged. LoftQ starts at what quantization lost.

Sources: Meng et al. 2024, PiSSA, arXiv:2404.02948, section 3; Büyükakyüz 2024, OLoRA,
arXiv:2406.01775, section 3; Li et al. 2023, LoftQ, arXiv:2310.08659, algorithm 1 with T = 1.
"""

from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization
from transformers.pytorch_utils import Conv1D

from stages.shared.core import display
from stages.shared.core.errors import UserError
from stages.shared.model import loading
from stages.shared.model.loading import ADAPTER
from stages.shared.step.config import Lora
from stages.shared.weights.bnb import Linear4bit, Linear8bitLt

Factors = tuple[torch.Tensor, torch.Tensor]  # A [r, in] and B [out, r], fp32
WITH_FROZEN = ("pissa", "olora")


class _FrozenHalf(nn.Module):
    """Parametrization of a weight as [trainable; frozen]: the optimizer sees the first half."""

    frozen: torch.Tensor

    def __init__(self, frozen: torch.Tensor, dim: int) -> None:
        super().__init__()
        self.register_buffer("frozen", frozen)
        self.dim = dim

    def forward(self, trainable: torch.Tensor) -> torch.Tensor:
        return torch.cat([trainable, self.frozen], self.dim)


def freeze_half(layer: nn.Linear, trainable: torch.Tensor, frozen: torch.Tensor, dim: int) -> None:
    """Make a layer's weight [trainable; frozen] along `dim`."""
    layer.weight.data = trainable.contiguous()
    register_parametrization(layer, "weight", _FrozenHalf(frozen.clone(), dim), unsafe=True)


def ordinary_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The state dict with both halves of each weight under its own name."""
    state = {k: v for k, v in model.state_dict().items() if ".parametrizations." not in k}
    layers = (pair for pair in model.named_modules() if is_parametrized(pair[1], "weight"))
    return state | {f"{name}.weight": layer.weight.detach() for name, layer in layers}


def rank_and_alpha(lora: Lora) -> tuple[int, float]:
    """Rank and alpha of the adapter as saved; its scale stays that of `lora`."""
    if lora.init not in WITH_FROZEN:
        return lora.r, lora.alpha
    return 2 * lora.r, lora.alpha * (sqrt(2) if lora.rslora else 2)


@torch.no_grad()
def initialise(model: PeftModel, lora: Lora, original: Path | None) -> None:
    """Initialise an adapter, of `original` weights for LoftQ; UserError where one has no start."""
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        base, size = layer.get_base_layer(), min(layer.in_features, layer.out_features)
        if not isinstance(base, nn.Linear | Conv1D) or lora.r > size:
            raise UserError(
                f"lora.init: {name} ({type(base).__name__}) has no {lora.init} decomposition of "
                f"rank lora.r ({lora.r}). Lower lora.r, or change lora.target_modules."
            )
    whole: Any = loading.load_model(original, torch.device("cpu")) if original else None
    with display.bar(total=len(layers), desc=lora.init, unit="matrix") as bar:
        for name, layer in layers.items():
            base, scale = layer.get_base_layer(), layer.scaling[ADAPTER]
            lora_a, lora_b, weight = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], _dense(base)
            if lora.init in WITH_FROZEN:
                start = qr_factors if lora.init == "olora" else svd_factors
                a, b = start(weight, lora.r, scale)
                freeze_half(lora_a, a, a, 0)
                freeze_half(lora_b, b, -b, 1)
            elif isinstance(base, Linear4bit | Linear8bitLt):  # a dense head has lost nothing
                before = _dense(whole.get_submodule(name)).to(weight.device)
                a, b = svd_factors(before - weight, lora.r, scale)
                lora_a.weight.copy_(a)
                lora_b.weight.copy_(b)
            bar.update()
    if lora.init == "loftq":
        model.peft_config[ADAPTER].loftq_config = {"loftq_iter": 1}  # `merge` reads it


def svd_factors(matrix: torch.Tensor, rank: int, scale: float) -> Factors:
    """Equally large factors: the error of scale·B·A is within 0.1 % of the truncated SVD's.

    Randomized, in milliseconds: Halko et al. 2011, arXiv:0909.4061, algorithm 4.4.
    """
    u, s, v = torch.svd_lowrank(matrix, min(2 * rank, *matrix.shape), niter=8)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:, :rank].T, u[:, :rank] * root


def qr_factors(matrix: torch.Tensor, rank: int, _scale: float) -> Factors:
    """First rows of R and columns of Q, in matrix = Q·R."""
    q = torch.linalg.qr(matrix[:, :rank]).Q
    return q.T @ matrix, q


def _dense(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer multiplies with, fp32 [out, in]."""
    weight = dequantize_module_weight(layer).detach().float()
    return weight.T if isinstance(layer, Conv1D) else weight
