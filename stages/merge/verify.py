"""Verification of a merge: the merged against the trained model, on held-out conversations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.shared.core.errors import UserError
from stages.shared.model import loading
from stages.shared.model.packing import Example
from stages.shared.parallel import placement
from stages.shared.parallel.group import Group
from stages.shared.parallel.placement import Member
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
Models = tuple[Path, Path, Path]  # merged; adapter, or what full fine-tuning left; quantized base


def verify(
    models: Models,
    examples: Sequence[Example],
    device: torch.device,
    *,
    required: bool,
    member: Member | None = None,
) -> dict[str, Any]:
    """Metrics of the merged against the trained model; a UserError where they must agree.

    In fp32 in this process on the CPU, one model after the other, and in the device's compute dtype
    wherever `placement` puts them; `member` where torchrun or Slurm has started the devices.
    """
    merged, adapter, quantized = models
    trained, expected = trained_exactly(adapter, quantized, examples, device)
    model = loading.load_model(merged, CPU, torch.float32)
    expert_error = largest_expert_error(expected, expert_outputs(model))
    largest = _LargestActivation(model)
    saved = log_probabilities(model, examples, CPU, torch.float32, "verify: merged")
    del model
    exact = compare(trained, saved)
    del trained
    stored, dtype = loading.stored_dtype(merged), loading.compute_dtype(merged, device)
    if required:
        require(exact, stored)
        require_experts(expert_error)
    if stored == torch.float16 and largest.value > FP16_MAX:
        raise UserError(
            f"params.yaml: merge.dtype is fp16, which ends at {FP16_MAX:.0f}, but activations "
            f"reach {largest.value:.3g}. Set merge.dtype to bf16 or fp32."
        )
    known = saved if (device, dtype) == (CPU, torch.float32) else None
    runtime = agreement_as_run(models, examples, device, member, known)
    return {
        "kl_divergence": exact.kl_divergence,
        "top1_agreement": exact.top1_agreement,
        "runtime_kl_divergence": runtime.kl_divergence,
        "runtime_top1_agreement": runtime.top1_agreement,
        "runtime_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(stored).removeprefix("torch."),
        "positions": exact.positions,
        **({"expert_error": expert_error} if expected else {}),
    }


def trained_exactly(
    adapter: Path, quantized: Path, examples: Sequence[Example], device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probabilities and expert outputs of the trained model in fp32.

    Its weights are those that `device` multiplies with.
    """
    model: nn.Module
    if loading.is_adapter(adapter):
        model = loading.attach(loading.load_dequantized(quantized, device), adapter)
    else:
        model = loading.load_model(adapter, CPU, torch.float32)
    outputs = expert_outputs(model)
    return log_probabilities(model, examples, CPU, torch.float32, "verify: trained"), outputs


def agreement_as_run(
    models: Models,
    examples: Sequence[Example],
    device: torch.device,
    member: Member | None = None,
    saved: list[torch.Tensor] | None = None,
) -> Agreement:
    """Agreement of both models in the device's compute dtype; of several processes, in each.

    Where they are `member`s, the first one's `models`. `saved`: the merged model's
    log-probabilities where they are known.
    """
    models = member[0].broadcast(models) if member else models
    shards = placement.shards_for(models[0], device, member)
    inputs = (models, examples, saved if shards == 1 and not member else None)
    result: Agreement = placement.compute(member, device, shards, _share_of_agreement, *inputs)
    return result


def _share_of_agreement(
    group: Group,
    device: torch.device,
    sharded: bool,
    models: Models,
    examples: Sequence[Example],
    saved: list[torch.Tensor] | None,
) -> Agreement:
    """The same by one of several processes, which share conversations and, `sharded`, weights."""
    placement.require_same(group, *models)
    (merged, adapter, quantized), share = models, (group.rank, group.size)

    def computed(folder: Path, desc: str) -> list[torch.Tensor]:
        based_on = quantized if loading.is_adapter(folder) else folder
        dtype = loading.compute_dtype(based_on, device)
        model = loading.load_adapted(folder, quantized, device, on_cpu=sharded)
        if sharded:
            Shards(model, group, device)
        return log_probabilities(model, examples, device, dtype, desc, share)

    saved = saved or computed(merged, "runtime: merged")
    trained = computed(adapter, "runtime: adapter")
    own = compare(trained, saved) if any(map(len, saved)) else Agreement(0.0, 0.0, 0)
    return mean(group.gather(own))


@torch.inference_mode()
def expert_outputs(model: Any) -> list[torch.Tensor]:
    """Outputs of each expert for the same random inputs: fp32 [experts, PROBES, hidden] a layer.

    Held-out conversations may never reach an expert.
    """
    random = torch.Generator().manual_seed(0)
    width = model.config.get_text_config().hidden_size
    inputs = torch.randn(PROBES, width, generator=random)
    return [torch.stack([expert(inputs) for expert in layer]) for layer in experts.layers(model)]


def largest_expert_error(expected: Sequence[torch.Tensor], merged: Sequence[torch.Tensor]) -> float:
    """Largest relative error of an expert's output (Frobenius)."""
    pairs = zip(expected, merged, strict=True)
    errors = [((y - x).norm(dim=(1, 2)) / x.norm(dim=(1, 2)).clamp_min(1e-30)) for x, y in pairs]
    return max((error.max().item() for error in errors), default=0.0)


def require_experts(error: float) -> None:
    """Raise a UserError if an expert was merged wrongly, or rounded too much."""
    if error > MAX_EXPERT_ERROR:
        raise UserError(
            f"models/merged: an expert's output differs from the trained one's by {error:.1%} (at "
            f"most {MAX_EXPERT_ERROR:.0%}); nothing was written. Set merge.dtype to fp16 or fp32."
        )


class _LargestActivation:
    """Largest magnitude among inputs and outputs of all modules."""

    def __init__(self, model: nn.Module) -> None:
        self.value = torch.zeros(())
        for module in model.modules():
            module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for x in (*inputs, *(output if isinstance(output, tuple) else (output,))):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
                self.value = torch.maximum(self.value, x.abs().max())


def require(agreement: Agreement, dtype: torch.dtype) -> None:
    """Raise a UserError if agreement is too low; one top-1 token may always differ, for ties."""
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
        f"models/merged: differs from the adapter at {agreement.positions} held-out positions: "
        f"top-1 agreement {agreement.top1_agreement:.4f} (at least {MIN_TOP1_AGREEMENT}), KL "
        f"{agreement.kl_divergence:.2e} nats a token (at most {MAX_KL_DIVERGENCE}); "
        f"nothing was written. {advice[dtype]}"
    )
