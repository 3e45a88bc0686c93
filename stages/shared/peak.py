"""The most memory that a training step holds: the largest of its instants, part by part.

peak = what persists + the largest, over the instants, of what stands only then. Nothing is fitted:
every term is a number of elements times their size, and `benchmarks/memory.py` holds the sums
against real steps.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from stages.shared import fused_instants, instants, memory, uncalibrated, workspace
from stages.shared.blocks import Saved
from stages.shared.fused_instants import Attention
from stages.shared.instants import Instant
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
        instants_ = step_instants(model, tuning, batch)
        instant, parts = max(instants_, key=lambda found: sum(found[1].values()))
        low = sum(parts.values())
    lowest_bytes = sum(kept.values()) + low
    parts["workspace"] += uncalibrated.options_bytes(model, tuning, batch)
    calibrated = not uncalibrated.reasons(model, tuning, batch)
    return Prediction(kept | parts, instant, calibrated, lowest_bytes)


def evaluation(model: Model, tuning: Tuning, batch: MicroBatch) -> Prediction:
    """The peak of scoring held-out conversations between two steps of a training.

    Nothing is kept for a backward pass, but the scorer's micro-batches may be larger than those of
    training, and what persists is there all the same but for gradients. Of a full
    fine-tune the weights are scored as their file will hold them: 2·P of copies.

    Args:
        model: from `architecture.model_of_config`.
        tuning: how it is tuned.
        batch: the largest micro-batch of the scorer.
    """
    kept = persistent_parts(model, tuning) | {"gradients": 0}
    if model.block is None:
        return predict(model, replace(tuning, gradient_checkpointing=True), batch)
    flow, n = tuning.flow, batch.tokens
    saved = _saved(model, tuning)
    matrix = workspace.dequantized_bytes(saved.block.largest_matrix, tuning)
    around = workspace.input_bytes(model, tuning, batch) + 2 * flow.stream * model.hidden * n
    masters = tuning.adapter is None and tuning.casts_trained
    scored = memory.dense_bytes(sum(tuning.trained_sizes(model)), "bf16") if masters else 0
    copies = 0 if masters else workspace.block_copies_bytes(model, tuning)
    logits = workspace.loss_forward_bytes(model.vocabulary, batch.supervised)
    found = [("evaluation, loss", {"activations": around, "logits": logits, "workspace": copies})]
    scored_blocks = instants.evaluation(saved, matrix)
    if not flow.kernel:
        attention = Attention(saved, batch.tokens_together)
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
    by_size = sorted(batches, key=lambda b: (b.tokens, b.supervised, b.tokens_together))
    for batch in reversed(by_size):
        if not any(larger.outdoes(batch) for larger in found):
            found.append(batch)
    return found


def step_instants(
    model: Model, tuning: Tuning, batch: MicroBatch
) -> Iterator[tuple[str, dict[str, int]]]:
    """The instants that can be the largest, and what stands beside what persists at each."""
    flow, n, checkpointed = tuning.flow, batch.tokens, tuning.gradient_checkpointing
    saved = _saved(model, tuning)
    matrix = workspace.dequantized_bytes(saved.block.largest_matrix, tuning)
    inputs = workspace.input_bytes(model, tuning, batch)
    mask = workspace.mask_bytes(model, tuning, batch)
    stored = stored_bytes(model, tuning, batch) + inputs + (mask if checkpointed else 0)
    copies = workspace.block_copies_bytes(model, tuning)
    head_copy = workspace.head_copy_bytes(model, tuning)
    kept_copies = copies // model.layers if checkpointed else copies
    waiting = workspace.waiting_gradient_bytes(model, tuning)
    final = stored + workspace.final_norm_bytes(model, tuning, batch)

    def parts(activations: int, logits: int = 0, work: int = 0) -> dict[str, int]:
        return {"activations": activations, "logits": logits, "workspace": work}

    def in_block(at: Instant, others: int, work: int) -> dict[str, int]:
        return parts(others + (at.saved + at.extra) * n, work=at.matrix + work)

    first, forward, backward = _of_a_block(model, tuning, batch, saved, matrix)
    # One block stands at its own instant, the others with all that they store.
    others = stored - (_shared_with_store(tuning, model) if checkpointed else saved.total) * n
    if checkpointed:
        for at in first:
            yield "first forward pass", in_block(at, stored, copies)
    forward_work = kept_copies + (waiting if checkpointed else 0)
    callers = 0 if checkpointed else mask + _held_by_callers(tuning, model) * n
    for at in forward:
        yield "forward pass of a block", in_block(at, others + callers, forward_work)
    for at in backward:
        yield "backward pass of a block", in_block(at, others, kept_copies + waiting)
    v, s = model.vocabulary, batch.supervised
    if flow.fused:
        forward_logits = workspace.fused_loss_bytes(model, tuning, batch)
        backward_logits = workspace.fused_loss_gradient_bytes(model, tuning, batch)
    else:
        forward_logits = workspace.loss_forward_bytes(v, s)
        backward_logits = workspace.loss_backward_bytes(v, s)
    # Autocast forgets its copies at the end of the forward pass; checkpointed blocks have no other.
    copies_after = head_copy + (0 if checkpointed else copies)
    yield "loss", parts(final, forward_logits, copies + head_copy)
    yield "gradient of the loss", parts(final, backward_logits, copies_after)
    gradient = workspace.final_norm_gradient_bytes(model.hidden, n, tuning)
    yield (
        "gradient of the last norm",
        parts(final + gradient, work=copies_after - head_copy + waiting),
    )
    if flow.trained:
        head = workspace.head_gradient_bytes(model, tuning, batch)
        yield "gradient of the head", parts(final, work=copies_after + head)
        embedding = workspace.embedding_gradient_bytes(model, tuning)
        yield "gradient of the embedding", parts(inputs + 4 * model.hidden * n, work=embedding)
    yield "optimizer step", parts(0, work=workspace.optimizer_step_bytes(model, tuning))


def stored_bytes(model: Model, tuning: Tuning, batch: MicroBatch) -> int:
    """What all blocks keep for the backward pass.

    N·L·(what a block saves); with checkpointing N·L·s·h, each block's input alone, and what int8
    products keep regardless. Below the first norm is the embedding: frozen, it wants no gradient.

    Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
    """
    saved, flow = _saved(model, tuning), tuning.flow
    if tuning.gradient_checkpointing:
        a_block = flow.stream * model.hidden + saved.kept_by_products
        return model.layers * a_block * batch.tokens
    unneeded = 0 if flow.trained else saved.norm
    return (model.layers * saved.total - unneeded) * batch.tokens


def _saved(model: Model, tuning: Tuning) -> Saved:
    if model.block is None:
        raise ValueError(f"blocks of {model.kind} have no formula")
    return Saved(model.block, tuning.flow)


def _of_a_block(
    model: Model, tuning: Tuning, batch: MicroBatch, saved: Saved, matrix: int
) -> tuple[list[Instant], list[Instant], list[Instant]]:
    """Its instants in a first forward pass that saves nothing, in the forward and the backward."""
    flow = tuning.flow
    if flow.fused:
        first = fused_instants.first_forward(saved, matrix)
        forward = fused_instants.forward(saved, matrix)
        backward = fused_instants.backward(saved, matrix)
    else:
        first = instants.first_forward(saved, matrix)
        forward = instants.forward(saved, matrix)
        backward = instants.backward(saved, matrix, recomputed=tuning.gradient_checkpointing)
    if not flow.kernel:
        attention = Attention(saved, batch.tokens_together)
        first.append(attention.without_gradients())
        forward.append(attention.forward())
        backward.append(attention.backward())
    return first, forward, backward


def _shared_with_store(tuning: Tuning, model: Model) -> int:
    """A recomputed block's first norm saves the stored input itself: in fp32, and if fused."""
    flow = tuning.flow
    return flow.stream * model.hidden if flow.stream == 4 or flow.fused else 0


def _held_by_callers(tuning: Tuning, model: Model) -> int:
    """The embeddings, and a block's input, are named until the forward pass is over."""
    flow = tuning.flow
    if flow.trained:
        return 0  # norms have saved them
    return flow.stream * model.hidden * (1 if flow.stream == 4 or flow.fused else 2)
