"""The proof of a merge: two models, the same held-out conversations, position by position."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.shared.core.errors import UserError
from stages.shared.model import loading, scoring
from stages.shared.model.packing import Example
from stages.shared.weights.precision import autocast

POSITIONS = 4096  # enough to tell an agreement of 0.99 from 0.98; bounds time and memory
MIN_TOP1_AGREEMENT = 0.99
MAX_KL_DIVERGENCE = 1e-3  # nats a token
FP16_MAX = torch.finfo(torch.float16).max
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Agreement:
    """How far two models agree: mean KL(first ‖ second) in nats a token, and equal top-1 tokens."""

    kl_divergence: float
    top1_agreement: float
    positions: int


def verify(
    merged: Path,
    adapter: Path,
    quantized: Path,
    examples: Sequence[Example],
    device: torch.device,
    *,
    required: bool,
) -> dict[str, Any]:
    """Compare the file of a merged model with the trained one: exactly, and as this device runs it.

    Raises:
        UserError: they disagree though it is `required`, or a default load of the file overflows.
    """
    trained = trained_exactly(adapter, quantized, examples, device)
    model = loading.load_model(merged, CPU, torch.float32)
    largest = _LargestActivation(model)
    saved = log_probabilities(model, examples, CPU, torch.float32, "proof: merged")
    del model
    exact = compare(trained, saved)
    del trained
    stored = loading.stored_dtype(merged)
    if required:
        require(exact, stored)
    if stored == torch.float16 and largest.value > FP16_MAX:
        raise UserError(
            f"params.yaml: merge.dtype is fp16, which ends at {FP16_MAX:.0f}, but activations "
            f"reach {largest.value:.3g}. Set merge.dtype to bf16 or fp32."
        )
    dtype = loading.compute_dtype(merged, device)
    if (device, dtype) != (CPU, torch.float32):  # else it has just been computed
        model = loading.load_model(merged, device, dtype)
        saved = log_probabilities(model, examples, device, dtype, "as run: merged")
        del model
    runtime = compare(trained_as_run(adapter, quantized, examples, device), saved)
    return {
        "kl_divergence": exact.kl_divergence,
        "top1_agreement": exact.top1_agreement,
        "runtime_kl_divergence": runtime.kl_divergence,
        "runtime_top1_agreement": runtime.top1_agreement,
        "runtime_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(stored).removeprefix("torch."),
        "positions": exact.positions,
    }


def trained_exactly(
    adapter: Path, quantized: Path, examples: Sequence[Example], device: torch.device
) -> list[torch.Tensor]:
    """Log-probabilities of the trained model in fp32, its adapter not merged.

    The weights below it are rounded as `device` rounds them before it multiplies.
    """
    model: nn.Module
    if loading.is_adapter(adapter):
        model = loading.attach(loading.load_dequantized(quantized, device), adapter)
    else:
        model = loading.load_model(adapter, CPU, torch.float32)
    return log_probabilities(model, examples, CPU, torch.float32, "proof: trained")


def trained_as_run(
    adapter: Path, quantized: Path, examples: Sequence[Example], device: torch.device
) -> list[torch.Tensor]:
    """The same as this device computes it: in half precision every layer rounds otherwise."""
    dtype = loading.compute_dtype(quantized if loading.is_adapter(adapter) else adapter, device)
    model = loading.load_adapted(adapter, quantized, device)
    return log_probabilities(model, examples, device, dtype, "as run: adapter")


class _LargestActivation:
    """The largest magnitude among inputs and outputs of a model's modules."""

    def __init__(self, model: nn.Module) -> None:
        self.value = torch.zeros(())
        for module in model.modules():
            module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for x in (*inputs, *(output if isinstance(output, tuple) else (output,))):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
                self.value = torch.maximum(self.value, x.abs().max())


def first_positions(examples: Sequence[Example]) -> list[Example]:
    """The first conversations, up to `POSITIONS` supervised tokens."""
    chosen: list[Example] = []
    total = 0
    for example in examples:
        total += example.supervised_tokens
        if chosen and total > POSITIONS:
            break
        chosen.append(example)
    return chosen


@torch.inference_mode()
def log_probabilities(
    model: nn.Module,
    examples: Sequence[Example],
    device: torch.device,
    dtype: torch.dtype,
    desc: str,
) -> list[torch.Tensor]:
    """The distribution at each supervised position, a tensor a batch: fp32 [supervised, vocab]."""
    result = []
    for batch in scoring.batches(examples, device, desc):
        with autocast(device, dtype):
            logits = scoring.supervised_logits(model, batch)
        result.append(logits.float().log_softmax(-1).cpu())
    return result


def compare(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> Agreement:
    """Compare two models' log-probabilities, batch by batch.

    Raises:
        UserError: one of them is not a number.
    """
    divergence, equal, positions = 0.0, 0, 0
    for one, other in zip(first, second, strict=True):
        p = one.exp()  # a token of probability 0 adds nothing, where the other may say so too
        terms = torch.where(p == 0, 0.0, p * (one - other))
        divergence += terms.sum(-1, dtype=torch.float64).sum().item()
        equal += int((one.argmax(-1) == other.argmax(-1)).sum())
        positions += len(one)
    if not math.isfinite(divergence):
        raise UserError(
            "models/merged: the trained or the merged model gives NaN or infinity for held-out "
            "conversations; nothing was written. Train at a lower train.learning_rate, or set "
            "merge.dtype to bf16 or fp32."
        )
    # Rounding can leave a sum of zeros a hair below zero.
    return Agreement(max(0.0, divergence / positions), equal / positions, positions)


def require(agreement: Agreement, dtype: torch.dtype) -> None:
    """Refuse a merged model that is not the trained one.

    One token may differ however few there are: two that are equally likely change places.
    """
    differ = round((1 - agreement.top1_agreement) * agreement.positions)
    allowed = max(1, int((1 - MIN_TOP1_AGREEMENT) * agreement.positions))
    if differ <= allowed and agreement.kl_divergence <= MAX_KL_DIVERGENCE:
        return
    advice = {
        torch.bfloat16: "Set merge.dtype to fp16 or fp32, which round less.",
        torch.float16: "Set merge.dtype to fp32, which rounds nothing.",
        torch.float32: "fp32 rounds nothing: please report this fault with your params.yaml.",
    }
    raise UserError(
        f"models/merged: over {agreement.positions} held-out positions it agrees with the adapter "
        f"in {agreement.top1_agreement:.4f} of its most likely tokens (at least "
        f"{MIN_TOP1_AGREEMENT}), at {agreement.kl_divergence:.2e} nats a token (at most "
        f"{MAX_KL_DIVERGENCE}); nothing was written. {advice[dtype]}"
    )
