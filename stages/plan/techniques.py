"""The ways to tune a model that are held against each other, and the cards they are for."""

from dataclasses import replace

from stages.shared import fitting
from stages.shared.fitting import GIB
from stages.shared.memory import dense_precision
from stages.shared.peak import Prediction
from stages.shared.step.adapter_sizes import Adapter
from stages.shared.tensors import Model
from stages.shared.tuning import Tuning

CARDS_GIB = {
    "T4_16GiB": 16,
    "RTX_3090_24GiB": 24,
    "RTX_4090_24GiB": 24,
    "A100_40GiB": 40,
    "A100_80GiB": 80,
    "H100_80GiB": 80,
}
WITHOUT_BF16 = ("T4_16GiB",)  # compute capability 7.5; `quantize` refuses bf16 below 8.0


def standard(adapter: Adapter) -> dict[str, Tuning]:
    """The named techniques on CUDA, with AdamW, from the most memory to the least.

    `full_mixed` trains fp32 masters under bf16 autocast: 4 bytes of weights, 4 of gradients and 8
    of moments a parameter, the same 16 as the usual count of 2 + 2 + 4 + 8 with half-precision
    weights and gradients beside the masters (Rajbhandari et al. 2019, ZeRO, arXiv:1910.02054,
    section 3.1). `paged`: the optimizer's states have left the device, as far as they may.
    """
    quantized = Tuning("nf4", adapter, double_quant=True)
    checkpointed = replace(quantized, gradient_checkpointing=True)
    return {
        "full_fp32": Tuning("fp32", None),
        "full_mixed": Tuning("bf16", None),
        "full_bf16": Tuning("bf16", None, masters=False),
        "lora_bf16": Tuning("bf16", adapter),
        "lora_int8": Tuning("int8", adapter),
        "qlora_nf4": Tuning("nf4", adapter),
        "qlora_nf4_double": quantized,
        "qlora_nf4_double_checkpointed": checkpointed,
        "qlora_nf4_double_checkpointed_paged": replace(checkpointed, paged=True),
    }


def instead_of_bf16(card: str, tuning: Tuning) -> str | None:
    """What a card that has no bf16 must be given instead; None where it computes as it is asked."""
    if card not in WITHOUT_BF16 or dense_precision(tuning.precision, tuning.compute) != "bf16":
        return None
    if tuning.precision != "bf16":
        return "quantize.compute_dtype=fp16"
    return f"quantize.precision={'fp32' if tuning.adapter is None else 'fp16'}"


def cards_that_fit(model: Model, tuning: Tuning, prediction: Prediction) -> dict[str, bool]:
    """Whether each card has room for a peak, an assumed CUDA context included."""
    return {
        card: fitting.fits(model, tuning, prediction, gib * GIB) for card, gib in CARDS_GIB.items()
    }
