"""Ask the plan before a weight is read: how a step is best computed here, and whether it fits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.shared.core.errors import UserError
from stages.shared.model import packing, scoring
from stages.shared.model.packing import Example, require_vocabulary
from stages.shared.step import fit as planner
from stages.shared.step.count import StepCounter
from stages.shared.step.setup import Device, lora_of, micro_batch_of, setup_of, stored_as
from stages.shared.step.workload import Workload
from stages.shared.weights import precision
from stages.train.config import Params
from stages.train.schedule import Schedule

# More steps than this are stood for by one of the longest conversations.
STEPS_LOOKED_AT = 10_000


@dataclass(frozen=True)
class Fit:
    """How a step is computed, and the most memory that training is predicted to need.

    Attributes:
        micro_batch_tokens: the most that go through the model at once.
        gradient_checkpointing: whether activations are computed again.
        predicted_bytes: what the device, or a CPU's processes, will hold.
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
    processes: int = 1,
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
        processes: of a CPU that share a step and its memory.

    Raises:
        UserError: nothing fits; the line names the parts and what would make it fit. Or
            `lora.target_modules` match nothing.
    """
    config = model_folder / "config.json"
    setup = setup_of(
        stored_as(config),
        settings.lora,
        settings.train,
        device,
        bf16=precision.has_bf16_matmuls(device),
        fused=fusing,
    )
    with StepCounter(config) as counter:
        vocabulary = counter.model()["vocabulary"]
        for split in (train, held_out):
            require_vocabulary(split, vocabulary)
        request = planner.Request(
            counter,
            setup,
            Workload(_steps(settings, train)),
            total_bytes,
            micro_batch_tokens,
            gradient_checkpointing,
            scored=frozenset(map(micro_batch_of, packing.bins(held_out, scoring.SCORING_TOKENS))),
            workers=workers,
            processes=processes if device == "cpu" else 1,
            instead_of_full=lora_of(settings.lora),
        )
        choice = planner.choose(request)
        if choice is None:
            raise UserError(planner.refusal(request))
        return Fit(
            choice.micro_batch_tokens,
            choice.gradient_checkpointing,
            choice.device_bytes,
            counter.persistent(setup)["unfused_because"],
            choice.workers,
        )


def _steps(settings: Params, train: Sequence[Example]) -> list[list[Example]]:
    steps = Schedule.of(settings.train, len(train))
    if steps.total <= STEPS_LOOKED_AT:
        return [[train[row] for row in steps.rows(step)] for step in range(steps.total)]
    return [sorted(train, key=len)[-steps.batch_size :]]
