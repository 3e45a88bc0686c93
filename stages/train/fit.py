"""Ask the plan before a weight is read: how a step is best computed here, and whether it fits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stages.shared import architecture, fitting
from stages.shared.core.errors import UserError
from stages.shared.fitting import Request
from stages.shared.model import packing, scoring
from stages.shared.model.packing import Example, require_vocabulary
from stages.shared.refusal import refusal
from stages.shared.step import adapter_sizes as adapter
from stages.shared.tuning import Device, Tuning
from stages.shared.weights import precision
from stages.shared.workload import Workload
from stages.shared.workspace import micro_batch_of
from stages.train.schedule import Schedule
from stages.train.settings import Params

# More steps than this are stood for by one of the longest conversations.
STEPS_LOOKED_AT = 10_000


@dataclass(frozen=True)
class Fit:
    """How a step is computed, and the most memory that training is predicted to need.

    Attributes:
        micro_batch_tokens: the most that go through the model at once.
        gradient_checkpointing: whether activations are computed again.
        predicted_bytes: what the device must have, see `fitting.device_bytes`.
        unfused_because: why the library's own modules compute it; None if the fused functions do.
        workers: how many processes of a CPU compute parts of it.
    """

    micro_batch_tokens: int
    gradient_checkpointing: bool
    predicted_bytes: int
    unfused_because: str | None
    workers: int


def fit(
    settings: Params,
    model_folder: Path,
    train: Sequence[Example],
    held_out: Sequence[Example],
    device: Device,
    total_bytes: int,
    micro_batch_tokens: int | None = None,
    gradient_checkpointing: bool | None = None,
    workers: int = 1,
    fusing: bool = True,
) -> Fit:
    """Choose what is not set: the fastest that fits, as the plan predicts it.

    Args:
        settings: the parameters.
        model_folder: of the (quantized) weights; only its config is read.
        train: the conversations that are learnt.
        held_out: those that are scored.
        device: whose kernels run.
        total_bytes: of the device's memory, or the budget.
        micro_batch_tokens: None to choose.
        gradient_checkpointing: None to choose.
        workers: the most processes of a CPU that compute parts of a step.
        fusing: whether to use the fused functions where they cover what is trained.

    Raises:
        UserError: nothing fits; the line names the parts and what would make it fit. Or
            `lora.target_modules` match nothing.
    """
    model = architecture.model_of_config(model_folder / "config.json")
    for split in (train, held_out):
        require_vocabulary(split, model.vocabulary)
    stored = architecture.stored_as(model_folder / "config.json")
    lora = adapter.of_parameters(model.tensors, settings.lora)
    full = settings.train.method == "full"
    tuning = Tuning(
        stored.precision,
        None if full else lora,
        double_quant=stored.double_quant,
        compute=stored.compute,
        optimizer=settings.train.optimizer,
        dropout=settings.lora.dropout > 0,
        device=device,
        fusing=fusing,
        bf16=precision.has_bf16_matmuls(device),
    )
    request = Request(
        model,
        tuning,
        Workload(_steps(settings, train)),
        total_bytes,
        micro_batch_tokens,
        gradient_checkpointing,
        instead_of_full=lora,
        scored=frozenset(map(micro_batch_of, packing.bins(held_out, scoring.SCORING_TOKENS))),
        workers=workers,
    )
    choice = fitting.choose(request)
    if choice is None:
        raise UserError(refusal(request))
    chosen = replace(tuning, gradient_checkpointing=choice.gradient_checkpointing)
    predicted = fitting.device_bytes(model, chosen, choice.prediction, choice.workers)
    unknown = f"blocks of {model.kind} are not known" if model.block is None else None
    return Fit(
        choice.micro_batch_tokens,
        choice.gradient_checkpointing,
        predicted,
        tuning.unfused_because or unknown,
        choice.workers,
    )


def _steps(settings: Params, train: Sequence[Example]) -> list[list[Example]]:
    steps = Schedule.of(settings.train, len(train))
    if steps.total <= STEPS_LOOKED_AT:
        return [[train[row] for row in steps.rows(step)] for step in range(steps.total)]
    return [sorted(train, key=len)[-steps.batch_size :]]
