"""The most memory that a training step holds: the largest of its instants, part by part.

peak = what persists + the largest, over the instants, of what stands only then. Nothing is fitted:
every term is a number of elements times their size, and `benchmarks/memory.py` holds the sums
against real steps.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from stages.shared import instants, memory, step_phases, uncalibrated, workspace
from stages.shared.fused_instants import Attention
from stages.shared.tensors import Model
from stages.shared.tuning import Tuning
from stages.shared.workspace import MicroBatch

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace")


@dataclass(frozen=True)
class Prediction:
    """The peak of a training step, in bytes of live tensors.

    Attributes:
        parts: bytes by part, at the instant of the peak.
        instant: what is going on then.
        calibrated: whether models of this kind are held against measurements. If not, `parts` are
            the upper end of what is likely.
        lowest_bytes: the lower end; of a calibrated prediction its total.
    """

    parts: dict[str, int]
    instant: str
    calibrated: bool
    lowest_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


def predict(model: Model, tuning: Tuning, batch: MicroBatch) -> Prediction:
    """The peak of a training step whose micro-batches are like this one.

    Args:
        model: from `architecture.model_of_config`.
        tuning: how it is tuned.
        batch: the largest micro-batch. The step has more than one: activations stand beside the
            gradients of the micro-batch before.
    """
    kept = persistent_parts(model, tuning)
    if model.block is None:
        tuning = replace(tuning, fusing=False)
        instant, low, parts = _of_unknown_blocks(model, tuning, batch)
    else:
        found = step_phases.instants_of(model, tuning, batch)
        instant, parts = max(found, key=lambda instant: sum(instant[1].values()))
        low = sum(parts.values())
    lowest_bytes = sum(kept.values()) + low
    parts["workspace"] += uncalibrated.options_bytes(model, tuning, batch)
    calibrated = not uncalibrated.reasons(model, tuning, batch)
    return Prediction(kept | parts, instant, calibrated, lowest_bytes)


def evaluation(model: Model, tuning: Tuning, batch: MicroBatch) -> Prediction:
    """The peak of scoring held-out conversations between two steps of a training.

    Nothing is kept for a backward pass, but the scorer's micro-batches may be larger than those of
    training, and what persists is there all the same but for gradients. Of a full
    fine-tune the weights are scored as their file will hold them: copies, in what is computed in.

    Args:
        model: from `architecture.model_of_config`.
        tuning: how it is tuned.
        batch: the largest micro-batch of the scorer.
    """
    kept = persistent_parts(model, tuning) | {"gradients": 0}
    if model.block is None:
        return predict(model, replace(tuning, gradient_checkpointing=True), batch)
    flow, n = tuning.flow, batch.tokens
    saved = step_phases.saved_by_blocks(model, tuning)
    matrix = workspace.dequantized_bytes(saved.block.largest_matrix, tuning)
    around = workspace.input_bytes(model, tuning, batch) + 2 * flow.stream * model.hidden * n
    masters = tuning.adapter is None and tuning.rounds_masters
    scored = memory.dense_bytes(sum(tuning.trained_sizes(model)), tuning.dense) if masters else 0
    modules = replace(tuning, fusing=False)  # compute it, whatever computes a step
    copies = 0 if masters else workspace.block_copies_bytes(model, modules)
    logits = workspace.loss_forward_bytes(model.vocabulary, batch.supervised)
    found = [("evaluation, loss", {"activations": around, "logits": logits, "workspace": copies})]
    scored_blocks = instants.evaluation(saved, matrix)
    if not flow.kernel:
        attention = Attention(saved, *batch.alike)
        scored_blocks.append(attention.without_gradients())
    for at in scored_blocks:
        held = around + n**2 + (at.saved + at.extra) * n  # n²: the mask, see workspace
        parts = {"activations": held, "logits": 0, "workspace": at.matrix + copies}
        found.append(("evaluation, a block", parts))
    name, parts = max(found, key=lambda instant: sum(instant[1].values()))
    parts["workspace"] += scored
    total = sum(kept.values()) + sum(parts.values())
    return Prediction(kept | parts, name, not uncalibrated.reasons(model, tuning, batch), total)


def persistent_parts(model: Model, tuning: Tuning) -> dict[str, int]:
    """What is there at every instant, in bytes by part."""
    kept = tuning.persistent(model)
    return {
        "weights": kept.weights_bytes,
        "adapter": kept.adapter_bytes,
        "gradients": kept.gradients_bytes,
        "optimizer": kept.optimizer_bytes,
    }


def _of_unknown_blocks(
    model: Model, tuning: Tuning, batch: MicroBatch
) -> tuple[str, int, dict[str, int]]:
    """The peak of other blocks: bounds, with the upper one by part."""
    low, high = uncalibrated.activations_bytes(model, tuning, batch)
    logits = workspace.loss_backward_bytes(model.vocabulary, batch.supervised)
    parts = {
        "activations": high + batch.tokens**2,  # and the mask
        "logits": logits,
        "workspace": uncalibrated.workspace_bytes(model, tuning),
    }
    return "not known", max(low, logits), parts


def largest(model: Model, tuning: Tuning, batches: Iterable[MicroBatch]) -> Prediction:
    """The peak of a training that sees these micro-batches: that of the one that needs most."""
    predictions = (predict(model, tuning, batch) for batch in undominated(batches))
    return max(predictions, key=lambda prediction: prediction.total_bytes)


def undominated(batches: Iterable[MicroBatch]) -> list[MicroBatch]:
    """Those that no other equals or exceeds in every size: few of thousands."""
    found: list[MicroBatch] = []
    by_size = sorted(batches, key=lambda batch: batch.sizes)
    for batch in reversed(by_size):
        if not any(larger.outdoes(batch) for larger in found):
            found.append(batch)
    return found
