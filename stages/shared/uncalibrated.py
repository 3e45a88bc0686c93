"""Bounds where no formula has been held against measurements: models of another kind, options.

A model whose blocks are not those of `stages.shared.blocks` still has linear layers of known
widths, and what it keeps for its backward pass is some multiple of them. The bounds are wide on
purpose, and are never given as one figure.
"""

from stages.shared import memory, workspace
from stages.shared.tensors import Model
from stages.shared.tuning import Tuning
from stages.shared.workspace import MicroBatch

# Of the widths (in + out) of all linear layers, in compute precision, what blocks keep. Llama's own
# block keeps between 0.8 (full bf16) and 1.3 (int8 on a CPU) of it; the norms of others are more,
# their gates fewer.
LOWEST, HIGHEST = 0.5, 4.0


def reasons(model: Model, tuning: Tuning, batch: MicroBatch) -> list[str]:
    """Why a prediction is not calibrated; empty if it is."""
    found = []
    if model.block is None:
        found.append(f"blocks of {model.kind} have not been measured")
    counted = tuning.fused and tuning.flow.kernel
    if model.window and batch.tokens > model.window and not counted:
        found.append(f"conversations may be longer than the window of {model.window} tokens")
    if tuning.adapter and tuning.adapter.magnitudes:
        found.append("lora.dora has not been measured")
    if tuning.adapter and tuning.adapter.anchored:
        found.append("lora.init pissa or olora has not been measured")
    if tuning.adapter and tuning.adapter.copies:
        found.append("lora.modules_to_save has not been measured")
    return found


def activations_bytes(model: Model, tuning: Tuning, batch: MicroBatch) -> tuple[int, int]:
    """Lower and upper bound of what all blocks keep, or one and the inputs of all if checkpointed.

    A token goes through `active_experts` of a mixture's experts.
    """
    compute = memory.DENSE_BYTES[tuning.dense]
    linear = sum(sum(t.shape) for t in model.tensors if t.kind == "linear")
    experts = model.active_experts * sum(
        sum(t.shape[1:]) for t in model.tensors if t.kind == "experts"
    )
    widths = compute * (linear + experts) * batch.tokens
    low, high = LOWEST * widths, HIGHEST * widths
    if tuning.gradient_checkpointing:
        inputs = model.layers * tuning.flow.stream * model.hidden * batch.tokens
        low, high = low / model.layers + inputs, high / model.layers + inputs
    return int(low), int(high)


def workspace_bytes(model: Model, tuning: Tuning) -> int:
    """The largest matrix dequantized, autocast's copies, and the largest gradient."""
    largest = max((t.size for t in model.tensors if t.kind == "linear"), default=0)
    gradient = max(tuning.trained_sizes(model))
    return (
        workspace.dequantized_bytes(largest, tuning)
        + workspace.block_copies_bytes(model, tuning)
        + max(4 * gradient, workspace.optimizer_step_bytes(model, tuning))
    )


def options_bytes(model: Model, tuning: Tuning, batch: MicroBatch) -> int:
    """What options of the adapter that were not measured may add to the peak.

    Weight-decomposed adapters form each adapted matrix in fp32 (three times at once) and keep their
    results; anchored ones put their halves together in fp32 for each product; a layer trained in
    full has a copy, a gradient and its input.
    """
    adapter = tuning.adapter
    if adapter is None:
        return 0
    added = 4 * adapter.multiplied if adapter.anchored else 0
    if adapter.magnitudes:
        linear = [t for t in model.tensors if t.kind == "linear"]
        results = 12 * sum(t.shape[0] for t in linear) * batch.tokens
        matrices = 12 * max(t.size for t in linear)
        added += matrices + (results // model.layers if tuning.gradient_checkpointing else results)
    if adapter.copies:
        added += 10 * sum(adapter.copies) + 8 * (model.hidden + model.vocabulary) * batch.tokens
    return added
