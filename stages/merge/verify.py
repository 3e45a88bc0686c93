"""Verification of a merge: the merged against the trained model, on held-out conversations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.shared.model import loading  # before peft

# isort: split
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from stages.shared.core.errors import UserError
from stages.shared.model.packing import Example
from stages.shared.parallel import launcher, placement
from stages.shared.parallel.group import Group, Member
from stages.shared.parallel.shards import Shards
from stages.shared.verify.agreement import Agreement, compare, log_probabilities, mean
from stages.shared.weights import experts

POSITIONS = 4096  # enough to tell an agreement of 0.99 from 0.98
MIN_TOP1_AGREEMENT = 0.99
MAX_KL_DIVERGENCE = 1e-3  # nats a token
MAX_EXPERT_ERROR = 0.05  # bf16's rounding gives about 0.005
PROBES = 2  # random inputs of each expert
FP16_MAX = torch.finfo(torch.float16).max
CPU = torch.device("cpu")
Predictions = tuple[list[torch.Tensor], list[torch.Tensor]]  # log-probabilities; experts' outputs
Models = tuple[Path, Path, Path]  # merged; adapter, or what full fine-tuning left; quantized base


def verify(
    models: Models,
    trained: Predictions,
    examples: Sequence[Example],
    device: torch.device,
    *,
    required: bool,
    member: Member | None = None,
) -> dict[str, Any]:
    """Metrics of the merged against the `trained` model; a UserError where they must agree.

    In fp32 in this process on the CPU, and in the device's compute dtype on as many as
    `placement.shards_for` says; `member` where torchrun or Slurm has started them.
    """
    merged, (expected, expert_outputs) = models[0], trained
    model = loading.load_model(merged, CPU, torch.float32)
    expert_error = largest_error(expert_outputs, outputs_of_experts(model))
    largest = record_largest_activation(model)
    predicted = log_probabilities(model, examples, CPU, torch.float32, "verify: merged")
    del model
    exact = compare(expected, predicted)
    expected.clear()  # before the next pass: 0.6 GB of the default's
    stored, dtype = loading.stored_dtype(merged), loading.compute_dtype(merged, device)
    if required:
        require(exact, stored, expert_error)
    if stored == torch.float16 and largest > FP16_MAX:
        raise UserError(
            f"params.yaml: merge.dtype is fp16, which ends at {FP16_MAX:.0f}, but activations "
            f"reach {largest:.3g}. Set merge.dtype to bf16 or fp32."
        )
    same = (device, dtype) == (CPU, torch.float32)
    runtime = agreement_as_run(models, examples, device, member, predicted if same else None)
    return {
        "kl_divergence": exact.kl_divergence,
        "top1_agreement": exact.top1_agreement,
        "runtime_kl_divergence": runtime.kl_divergence,
        "runtime_top1_agreement": runtime.top1_agreement,
        "runtime_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(stored).removeprefix("torch."),
        "positions": exact.positions,
        **({"expert_error": expert_error} if expert_outputs else {}),
    }


def load_trained(adapter: Path, base: Path, device: torch.device) -> PreTrainedModel | PeftModel:
    """Load the trained model in fp32 on the CPU, with the weights that `device` multiplies with."""
    if loading.is_adapter(adapter):
        return loading.attach(loading.load_dequantized(base, device), adapter)
    return loading.load_model(adapter, CPU, torch.float32)


def predict(model: nn.Module, examples: Sequence[Example]) -> Predictions:
    """Predictions of the trained model in fp32 on the CPU."""
    outputs = outputs_of_experts(model)
    return log_probabilities(model, examples, CPU, torch.float32, "verify: trained"), outputs


def agreement_as_run(
    models: Models,
    examples: Sequence[Example],
    device: torch.device,
    member: Member | None = None,
    merged: list[torch.Tensor] | None = None,
) -> Agreement:
    """Agreement of both models in the device's compute dtype; of several processes, in each.

    Where they are `member`s, the first one's `models`. `merged`: the merged model's
    log-probabilities where they are known.
    """
    models = member[0].broadcast(models) if member else models
    shards = placement.shards_for(models[0], device, member)
    inputs = (models, examples, merged if shards == 1 and not member else None)
    result: Agreement = launcher.compute(member, device, shards, _share_of_agreement, *inputs)
    return result


def _share_of_agreement(
    group: Group,
    device: torch.device,
    sharded: bool,
    models: Models,
    examples: Sequence[Example],
    merged: list[torch.Tensor] | None,
) -> Agreement:
    """The same by one of several processes, which share conversations and, `sharded`, weights."""
    placement.require_same(group, *models)

    def predict(folder: Path, desc: str) -> list[torch.Tensor]:
        quantized, share = models[2], (group.rank, group.size)
        based_on = quantized if loading.is_adapter(folder) else folder
        dtype = loading.compute_dtype(based_on, device)
        model = loading.load_adapted(folder, quantized, device, on_cpu=sharded)
        if sharded:
            Shards(model, group, device)
        return log_probabilities(model, examples, device, dtype, desc, share)

    merged = merged or predict(models[0], "runtime: merged")
    trained = predict(models[1], "runtime: adapter")
    own = compare(trained, merged) if any(map(len, merged)) else Agreement(0.0, 0.0, 0)
    return mean(group.gather(own))


@torch.inference_mode()
def outputs_of_experts(model: Any) -> list[torch.Tensor]:
    """Outputs of each expert for the same random inputs: fp32 [experts, PROBES, hidden] a layer.

    Held-out conversations may never reach an expert.
    """
    random = torch.Generator().manual_seed(0)
    width = model.config.get_text_config().hidden_size
    inputs = torch.randn(PROBES, width, generator=random)
    return [torch.stack([expert(inputs) for expert in layer]) for layer in experts.layers(model)]


def largest_error(expected: Sequence[torch.Tensor], merged: Sequence[torch.Tensor]) -> float:
    """Largest relative error of an expert's output (Frobenius)."""
    pairs = zip(expected, merged, strict=True)
    errors = [((y - x).norm(dim=(1, 2)) / x.norm(dim=(1, 2)).clamp_min(1e-30)) for x, y in pairs]
    return max((error.max().item() for error in errors), default=0.0)


def record_largest_activation(model: nn.Module) -> torch.Tensor:
    """Largest magnitude among inputs and outputs of all modules, updated by each forward pass."""
    largest = torch.zeros(())

    def update(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for x in (*inputs, *(output if isinstance(output, tuple) else (output,))):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
                largest.copy_(torch.stack([largest, *x.aminmax()]).abs().max())

    for module in model.modules():
        module.register_forward_hook(update)
    return largest


def require(agreement: Agreement, dtype: torch.dtype, expert_error: float = 0.0) -> None:
    """Raise a UserError if agreement is too low; one top-1 token may always differ, for ties."""
    positions, agreed = agreement.positions, agreement.top1_agreement
    fault = None
    allowed = max(1, int((1 - MIN_TOP1_AGREEMENT) * positions))
    if round((1 - agreed) * positions) > allowed or agreement.kl_divergence > MAX_KL_DIVERGENCE:
        fault = (
            f"differs from the adapter at {positions} held-out positions: top-1 agreement "
            f"{agreed:.4f} (at least {MIN_TOP1_AGREEMENT}), KL {agreement.kl_divergence:.2e} nats "
            f"a token (at most {MAX_KL_DIVERGENCE})"
        )
    elif expert_error > MAX_EXPERT_ERROR:
        fault = (
            f"an expert's output differs from the trained one's by {expert_error:.1%} "
            f"(at most {MAX_EXPERT_ERROR:.0%})"
        )
    advice = {
        torch.bfloat16: "Set merge.dtype to fp16 or fp32, which round less.",
        torch.float16: "Set merge.dtype to fp32, which rounds nothing.",
        torch.float32: "fp32 rounds nothing: please report this fault with your params.yaml.",
    }
    if fault:
        raise UserError(f"models/merged: {fault}; nothing was written. {advice[dtype]}")
