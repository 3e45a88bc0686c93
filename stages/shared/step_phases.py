"""The instants of a training step that can be its largest, and what stands beside what persists.

Names and letters are those of `stages.shared.blocks` and `stages.shared.workspace`.
"""

from collections.abc import Iterator

from stages.shared import fused_instants, instants, workspace
from stages.shared.blocks import Saved
from stages.shared.fused_instants import Attention
from stages.shared.instants import Instant
from stages.shared.tensors import Model
from stages.shared.tuning import Tuning
from stages.shared.workspace import MicroBatch


def instants_of(
    model: Model, tuning: Tuning, batch: MicroBatch
) -> Iterator[tuple[str, dict[str, int]]]:
    """The instants that can be the largest, and what stands beside what persists at each."""
    flow, n, checkpointed = tuning.flow, batch.tokens, tuning.gradient_checkpointing
    saved = saved_by_blocks(model, tuning)
    matrix = workspace.dequantized_bytes(saved.block.largest_matrix, tuning)
    inputs = workspace.input_bytes(model, tuning, batch)
    mask = workspace.mask_bytes(model, tuning, batch)
    stored = stored_bytes(model, tuning, batch) + inputs + (mask if checkpointed else 0)
    copies = workspace.block_copies_bytes(model, tuning)
    head_copy = workspace.head_copy_bytes(model, tuning)
    # Autocast forgets a checkpointed block's copies with it, and all others after the forward pass.
    forgotten = checkpointed and not flow.fused
    kept_copies = copies // model.layers if forgotten else copies
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
    copies_after = head_copy + (0 if forgotten else copies)
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
    products keep regardless. Below the first norm is the embedding: frozen, it wants no gradient
    (but the fused step computes from it again what it is normed to).

    Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
    """
    saved, flow = saved_by_blocks(model, tuning), tuning.flow
    if tuning.gradient_checkpointing:
        a_block = flow.stream * model.hidden + saved.kept_by_products
        return model.layers * a_block * batch.tokens
    unneeded = 0 if flow.trained or flow.fused else saved.norm
    return (model.layers * saved.total - unneeded) * batch.tokens


def saved_by_blocks(model: Model, tuning: Tuning) -> Saved:
    """What one of its blocks keeps for the backward pass.

    Raises:
        ValueError: its blocks are of a kind that has no formula.
    """
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
        attention = Attention(saved, *batch.alike)
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
