"""Techniques to compare, and the cards to compare them for."""

from dataclasses import replace
from typing import Any

from stages.shared.parallel.limits import GIB
from stages.shared.step.memory import fit
from stages.shared.step.memory.predict import PARTS, Prediction, StepCounter
from stages.shared.step.memory.setup import MicroBatch, TrainingSetup
from stages.shared.weights.precision import DENSE_BYTES

CARDS_GIB = {
    "T4_16GiB": 16,
    "RTX_4060_Ti_16GiB": 16,
    "RTX_3090_24GiB": 24,
    "RTX_4090_24GiB": 24,
    "A10G_24GiB": 24,
    "L4_24GiB": 24,
    "RTX_5090_32GiB": 32,
    "A100_40GiB": 40,
    "L40S_48GiB": 48,
    "A100_80GiB": 80,
    "H100_80GiB": 80,
    "H200_141GiB": 141,
    "MI300X_192GiB": 192,
}
BYTES_ALONE = ("MI300X_192GiB",)  # never run there
WITHOUT_BF16 = ("T4_16GiB",)  # compute capability 7.5; `quantize` refuses bf16 below 8.0
PAGED = "_paged"  # all pageable optimizer states are off the device


def standard(lora: dict[str, Any]) -> dict[str, TrainingSetup]:
    """Named techniques on CUDA with AdamW, by descending memory.

    `full_mixed`: fp32 masters under bf16 autocast, bytes a parameter: 4 of weights, 4 of gradients,
    8 of moments; 16 as in ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054, section 3.1).
    """
    double = TrainingSetup("nf4", lora, double_quant=True)
    checkpointed = replace(double, gradient_checkpointing=True)
    return {
        "full_fp32": TrainingSetup("fp32", None, stored="fp32", compute="fp32"),
        "full_mixed": TrainingSetup("bf16", None),
        "full_bf16": TrainingSetup("bf16", None, masters=False),
        "lora_bf16": TrainingSetup("bf16", lora),
        "lora_int8": TrainingSetup("int8", lora),
        "qlora_nf4": TrainingSetup("nf4", lora),
        "qlora_nf4_double": double,
        "qlora_nf4_double_checkpointed": checkpointed,
        f"qlora_nf4_double_checkpointed{PAGED}": checkpointed,
    }


def figures(
    counter: StepCounter, name: str, setup: TrainingSetup, batch: MicroBatch
) -> dict[str, Any]:
    """A technique's peak by part, and the cards that hold it with an assumed CUDA context."""
    prediction = counter.predict(setup, batch)
    pageable = counter.persistent(setup)["pageable"]
    parts = dict(prediction.parts)
    if name.endswith(PAGED):
        parts["optimizer"] -= pageable
    persistent = sum(parts[part] for part in PARTS[:4])

    def fits(needed: Prediction) -> dict[str, bool]:
        size = fit.device_bytes(counter, setup, needed)
        return {card: size <= gib * GIB for card, gib in CARDS_GIB.items()}

    return {
        **{f"{part}_bytes": parts[part] for part in PARTS},
        "persistent_bytes": persistent,
        "peak_bytes": sum(parts.values()),
        "phase": prediction.phase,
        "upper_bound": setup.precision == "int8",  # outliers of LLM.int8 depend on values
        "pageable_bytes": pageable,
        "persistent_fits": fits(Prediction({"persistent": persistent}, "")),
        "fits": fits(Prediction(parts, prediction.phase)),
    }


def instead_of_bf16(card: str, setup: TrainingSetup) -> str | None:
    """The parameter to set on a card without bf16, if any."""
    if card not in WITHOUT_BF16 or setup.stored != "bf16":
        return None
    if setup.precision not in DENSE_BYTES:
        return "quantize.compute_dtype=fp16"
    return f"quantize.precision={'fp32' if setup.lora is None else 'fp16'}"
