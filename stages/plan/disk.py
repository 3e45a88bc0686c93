"""What a run writes to the disk, in bytes."""

from stages.shared import memory
from stages.shared.tensors import Model, parameter_count
from stages.shared.tuning import Tuning

KEPT_CHECKPOINTS = 2  # unless QLORA_KEEP_CHECKPOINTS says otherwise
MERGED_BYTES = 2  # a parameter of the merged model, in fp16 or bf16


def needed(model: Model, tuning: Tuning) -> dict[str, int]:
    """Models, the resume state of a training while it runs, and what DVC's cache keeps in the end.

    The base is counted in bf16. A checkpoint holds what is trained, its optimizer's states, and a
    link to the best weights; one more than is kept is there while it is written.
    """
    parameters = parameter_count(model.tensors)
    trained = tuning.trained_sizes(model)
    weights = memory.weights_bytes(
        model.tensors,
        tuning.precision,
        double_quant=tuning.double_quant,
        dense=tuning.kept,
    )
    learnt = memory.dense_bytes(sum(trained), "fp32")
    checkpoint = learnt + memory.optimizer_bytes(tuning.optimizer, trained)
    tuned = learnt if tuning.adapter else MERGED_BYTES * parameters
    models = {
        "base_bytes": memory.dense_bytes(parameters, "bf16"),
        "quantized_bytes": weights,
        "adapter_bytes": tuned,
        "merged_bytes": MERGED_BYTES * parameters,
    }
    return {
        **models,
        "checkpoint_bytes": checkpoint,
        "resume_state_bytes": (KEPT_CHECKPOINTS + 1) * checkpoint + 2 * tuned,
        "cache_bytes": sum(models.values()),
    }
