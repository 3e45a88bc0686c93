"""Where an adapter starts, on weights that stay as they are cached.

PiSSA and OLoRA train factors that start at a principal part of each matrix W. As published they
take that part out of W, and a quantized W would have to be quantized again. Here W keeps it, and a
frozen copy of the start is subtracted instead: W + s·(B·A − B₀·A₀), which begins at W itself. Laid
side by side, [B, −B₀]·[A; A₀] is an ordinary LoRA adapter of twice the rank, and that is what is
trained through, evaluated, saved and merged.

LoftQ starts at the part of W that quantization lost: the best approximation of rank r of what the
original weights have and the quantized ones do not.

Sources: Meng et al. 2024, PiSSA, arXiv:2404.02948, section 3; Büyükakyüz 2024, OLoRA,
arXiv:2406.01775, section 3; Li et al. 2023, LoftQ, arXiv:2310.08659, algorithm 1 with T = 1 (more
rounds would quantize the base anew).
"""

from collections.abc import Callable, Mapping
from math import sqrt
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from stages.shared import models
from stages.shared.bnb import Linear4bit, Linear8bitLt
from stages.shared.core import progress
from stages.shared.core.errors import UserError
from stages.shared.step.adapter_sizes import ANCHORED
from stages.shared.step.anchored import anchor
from stages.shared.step.config import Lora

Factors = tuple[torch.Tensor, torch.Tensor]  # A [r, in] and B [out, r], fp32

ADAPTER = "default"  # peft's own name for the only one
POWER_ITERATIONS = 8  # with 2r columns the error is within 0.1 % of that of the exact decomposition


def rank_and_alpha(lora: Lora) -> tuple[int, float]:
    """Rank and alpha of the adapter as it is saved; its scale stays what `lora` says."""
    if lora.init not in ANCHORED:
        return lora.r, lora.alpha
    return 2 * lora.r, lora.alpha * (sqrt(2) if lora.rslora else 2)


def refuse_dense(folder: Path, lora: Lora) -> None:
    """LoftQ makes up for quantization: without it there is nothing to start from.

    Raises:
        UserError: `lora.init` is `loftq` and the weights in `folder` are not quantized.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if lora.init == "loftq" and getattr(config, "quantization_config", None) is None:
        raise UserError(
            "params.yaml: lora.init is 'loftq', which starts at what quantization lost, but "
            f"{folder} is not quantized; expected quantize.precision nf4, fp4 or int8; set it, or "
            "set lora.init to default or pissa"
        )


def initialise(model: PeftModel, lora: Lora, original: Path | None = None) -> None:
    """Put a fresh adapter where `lora.init` says.

    Args:
        model: with an adapter of `rank_and_alpha`; the weights below it are only read.
        lora: the parameters.
        original: for `loftq`, the folder of the weights before they were quantized.

    Raises:
        UserError: a layer has no matrix of rank `lora.r`.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    if lora.init != "default":
        _start(layers, lora, original)
    for layer in layers.values():
        if ADAPTER in layer.lora_magnitude_vector and ADAPTER in layer.lora_A:
            _measure_magnitude(layer)
    if lora.init == "loftq":
        model.peft_config[ADAPTER].loftq_config = {"loftq_iter": 1}  # for whoever merges it


def svd_factors(matrix: torch.Tensor, rank: int, scale: float) -> Factors:
    """A and B such that scale·B·A is the best approximation of a matrix of this rank (nearly).

    The singular values are shared evenly between the two. Randomized, so that a matrix of an 8B
    model takes milliseconds: Halko et al. 2011, arXiv:0909.4061, algorithm 4.4.
    """
    u, s, v = torch.svd_lowrank(matrix, min(2 * rank, *matrix.shape), niter=POWER_ITERATIONS)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:, :rank].T, u[:, :rank] * root


def qr_factors(matrix: torch.Tensor, rank: int) -> Factors:
    """The first rows of R and columns of Q in matrix = Q·R, which depend on its first columns."""
    q = torch.linalg.qr(matrix[:, :rank]).Q
    return q.T @ matrix, q


def _start(layers: Mapping[str, LoraLayer], lora: Lora, original: Path | None) -> None:
    for name, layer in layers.items():
        _refuse_unfit(name, layer, lora)
    factors = _loftq(original) if lora.init == "loftq" else _principal(lora.init)
    with progress.bar(total=len(layers), desc=lora.init, unit="matrix") as bar, torch.no_grad():
        for name, layer in layers.items():
            found = factors(name, layer, lora.r)
            if found is not None:
                _start_at(layer, *found, anchored=lora.init in ANCHORED)
            bar.update()


def _principal(init: str) -> Callable[[str, LoraLayer, int], Factors]:
    def factors(name: str, layer: LoraLayer, rank: int) -> Factors:
        matrix = _matrix(layer.get_base_layer())
        if init == "olora":
            return qr_factors(matrix, rank)
        return svd_factors(matrix, rank, layer.scaling[ADAPTER])

    return factors


def _loftq(original: Path | None) -> Callable[[str, LoraLayer, int], Factors | None]:
    if original is None:
        raise ValueError("loftq reads the original weights: expected their folder")
    whole = models.load_model(original, torch.device("cpu"))

    def factors(name: str, layer: LoraLayer, rank: int) -> Factors | None:
        quantized = layer.get_base_layer()
        if not isinstance(quantized, Linear4bit | Linear8bitLt):
            return None  # a head, say: nothing was lost
        matrix = _matrix(quantized)
        before = _matrix(whole.get_submodule(name.removeprefix("base_model.model.")))
        return svd_factors(before.to(matrix.device) - matrix, rank, layer.scaling[ADAPTER])

    return factors


def _matrix(layer: nn.Module) -> torch.Tensor:
    """What a layer multiplies with: fp32 [out, in]."""
    weight = dequantize_module_weight(layer).detach().float()
    return weight.T if isinstance(layer, Conv1D) else weight


def _start_at(layer: LoraLayer, a: torch.Tensor, b: torch.Tensor, *, anchored: bool) -> None:
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    if anchored:
        anchor(down, a, a, 0)
        anchor(up, b, -b, 1)
    else:
        down.weight.copy_(a)
        up.weight.copy_(b)


def _measure_magnitude(layer: LoraLayer) -> None:
    """DoRA: the magnitude of what is started from, in fp32.

    Peft takes it before the adapter is there, and rounded to the base's bf16: training would start
    beside the base.
    """
    layer.lora_magnitude_vector[ADAPTER].update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=layer.lora_A[ADAPTER].weight,
        lora_B=layer.lora_B[ADAPTER].weight,
        scaling=layer.scaling[ADAPTER],
    )


def _refuse_unfit(name: str, layer: LoraLayer, lora: Lora) -> None:
    below, expected = layer.get_base_layer(), "a linear layer"
    if isinstance(below, nn.Linear | Conv1D):
        smaller = min(layer.in_features, layer.out_features)
        if lora.r <= smaller:
            return
        expected = f"at most r {smaller} in a layer of {layer.in_features}→{layer.out_features}"
    raise UserError(
        f"params.yaml: lora.init is {lora.init!r}, which decomposes each matrix into lora.r "
        f"({lora.r}) directions, but lora.target_modules takes in "
        f"{name.removeprefix('base_model.model.')} ({type(below).__name__}); expected {expected}; "
        "change one of the three"
    )
