"""Figures of the plan: a pure function of config, data and parameters."""

from dataclasses import replace
from math import ceil
from typing import Any

from stages.plan.config import Data, Params
from stages.shared.core.errors import UserError
from stages.shared.parallel.placement import GIB
from stages.shared.step.memory import fit
from stages.shared.step.memory.fit import Choice, Request
from stages.shared.step.memory.predict import PARTS, Prediction, StepCounter
from stages.shared.step.memory.setup import (
    Device,
    MicroBatch,
    TrainingSetup,
    lora_of,
    setup_of,
    workload_of_counts,
)
from stages.shared.weights.precision import DENSE_BYTES

NOTE = (
    "Predicted peaks of live tensors in a training step on CUDA, by part: the step was run on "
    "tensors without values. A card must hold an assumed context besides."
)
MICRO_BATCH_TOKENS = 2048  # of the comparison, if the data has as many
LENGTHS = (512, 2048, 8192, 32_768)
KEPT_CHECKPOINTS = 2  # unless QLORA_KEEP_CHECKPOINTS says otherwise
MERGED_BYTES = 2  # per parameter: fp16 or bf16
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


def configured(values: Params, device: Device = "cuda", *, bf16: bool = True) -> TrainingSetup:
    """The setup of params.yaml; `UserError` for full tuning of quantized weights."""
    precision = values.quantize.precision
    if values.train.method == "full" and precision not in ("fp32", "bf16"):
        raise UserError(
            f"params.yaml: train.method is 'full' and quantize.precision is {precision!r}. "
            "Set quantize.precision to fp32 or bf16, or train.method to lora."
        )
    return setup_of(values.quantize, values.lora, values.train, device, bf16=bf16)


def request_of(
    counter: StepCounter,
    values: Params,
    counts: Data,
    setup: TrainingSetup,
    total_bytes: int = 0,
    devices: int = 1,
) -> Request:
    """A training within `total_bytes` a device; the processes of a CPU share them."""
    return Request(
        counter,
        setup,
        workload_of_counts(counts.longest, values.train.batch_size, counts.supervised_share),
        total_bytes,
        processes=devices if setup.device == "cpu" else 1,
        shards=fit.shard_counts(devices),
        instead_of_full=lora_of(values.lora),
    )


def plan(counter: StepCounter, counts: Data, values: Params) -> dict[str, Any]:
    """All figures, nested as in `reports/plan.json`."""
    setup, lora = configured(values), lora_of(values.lora)
    request = request_of(counter, values, counts, setup)
    batches = request.workload.micro_batches(MICRO_BATCH_TOKENS)
    batch = max(batches, key=lambda one: one.tokens)
    compared = {"configured": technique(counter, "configured", setup, batch)}
    left_out = {}
    for name, way in techniques(lora).items():
        try:
            compared[name] = technique(counter, name, way, batch)
        except UserError as error:  # modules_to_save on quantized weights, say
            left_out[name] = str(error)
    return {
        "note": NOTE,
        "model": counter.model()["parameters"],
        "adapter": {"parameters": counter.persistent(replace(setup, lora=lora))["trainable"]},
        "training": schedule(counts, values),
        "micro_batch": {"tokens": batch.tokens, "supervised": batch.supervised},
        "techniques": compared,
        "left_out": left_out,
        "configured_on": {
            card: {
                **chosen(replace(request, total_bytes=gib * GIB)),
                "instead_of_bf16": instead_of_bf16(card, setup),
            }
            for card, gib in CARDS_GIB.items()
        },
        "disk": disk(counter, setup),
        "operations_per_token": operations(counter, setup, counts),
    }


def techniques(lora: dict[str, Any]) -> dict[str, TrainingSetup]:
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


def technique(
    counter: StepCounter, name: str, setup: TrainingSetup, batch: MicroBatch
) -> dict[str, Any]:
    """A technique's peak by part, and the cards that hold it with an assumed CUDA context."""
    prediction = counter.predict(setup, batch)
    parts, pageable = dict(prediction.parts), counter.persistent(setup)["pageable"]
    if name.endswith(PAGED):
        parts["optimizer"] -= pageable
    persistent = sum(parts[part] for part in PARTS[:4])

    def fits(needed: int) -> dict[str, bool]:
        size = fit.device_bytes(counter, setup, Prediction({"all": needed}, ""))
        return {card: size <= gib * GIB for card, gib in CARDS_GIB.items()}

    return {
        **{f"{part}_bytes": parts[part] for part in PARTS},
        "persistent_bytes": persistent,
        "peak_bytes": sum(parts.values()),
        "phase": prediction.phase,
        "upper_bound": setup.precision == "int8",  # outliers of LLM.int8 depend on values
        "pageable_bytes": pageable,
        "persistent_fits": fits(persistent),
        "fits": fits(sum(parts.values())),
    }


def instead_of_bf16(card: str, setup: TrainingSetup) -> str | None:
    """The parameter to set on a card without bf16, if any."""
    if card not in WITHOUT_BF16 or setup.stored != "bf16":
        return None
    if setup.precision not in DENSE_BYTES:
        return "quantize.compute_dtype=fp16"
    return f"quantize.precision={'fp32' if setup.lora is None else 'fp16'}"


def schedule(counts: Data, values: Params) -> dict[str, int]:
    """Steps and tokens of a training without early stopping."""
    train = values.train
    steps = train.epochs * ceil(counts.conversations / train.batch_size)
    return {
        "steps": min(steps, train.max_steps or steps),
        "conversations": counts.conversations,
        "tokens": counts.tokens,
        "tokens_per_step": round(counts.mean_length * min(train.batch_size, counts.conversations)),
    }


def on_devices(counter: StepCounter, counts: Data, values: Params, devices: int) -> dict[str, Any]:
    """Training on several GPUs of each size, with all weights on each or a part: plans by way."""
    setup = configured(values)
    ways = {"whole": 1, "sharded": fit.shard_counts(devices)[-1]}
    request = request_of(counter, values, counts, setup)
    return {
        f"{devices} × {gib} GiB": {
            way: chosen(replace(request, total_bytes=gib * GIB, shards=(parts,)))
            for way, parts in ways.items()
        }
        for gib in sorted(set(CARDS_GIB.values()))
    }


def chosen(request: Request, choice: Choice | None = None) -> dict[str, Any]:
    """The step's execution plan within the requested memory, or that it does not fit."""
    choice = choice or fit.choose(request)
    if choice is None:
        return {"fits": False, "peak_bytes": fit.smallest(request).prediction.total_bytes}
    return {
        "fits": True,
        "peak_bytes": choice.prediction.total_bytes,
        "micro_batch_tokens": choice.micro_batch_tokens,
        "gradient_checkpointing": choice.gradient_checkpointing,
    }


def growth(counter: StepCounter, values: Params, counts: Data) -> dict[str, list[int]]:
    """Peak bytes of LoRA and QLoRA for one conversation of each of `LENGTHS` tokens."""
    ways = techniques(lora_of(values.lora))
    drawn = {"LoRA bf16": ways["lora_bf16"], "QLoRA nf4": ways["qlora_nf4_double"]}
    drawn |= {
        f"{name}, checkpointed": replace(way, gradient_checkpointing=True)
        for name, way in drawn.items()
    }
    batches = [MicroBatch((n,), round(n * counts.supervised_share)) for n in LENGTHS]
    return {
        name: [counter.predict(way, batch).total_bytes for batch in batches]
        for name, way in drawn.items()
    }


def disk(counter: StepCounter, setup: TrainingSetup) -> dict[str, int]:
    """Bytes on disk: models (the base in bf16), checkpoints while it trains, DVC's cache."""
    held, parameters = counter.persistent(setup), counter.model()["parameters"]["parameters"]
    trained = 4 * held["trainable"]
    checkpoint = trained + held["optimizer"]
    tuned = trained if setup.lora else MERGED_BYTES * parameters
    models = {
        "base_bytes": 2 * parameters,
        "quantized_bytes": held["weights"]
        if setup.lora
        else DENSE_BYTES[setup.stored] * parameters,
        "adapter_bytes": tuned,
        "merged_bytes": MERGED_BYTES * parameters,
    }
    return {
        **models,
        "checkpoint_bytes": checkpoint,
        # One more than is kept exists while it is written; each links the best weights.
        "resume_state_bytes": (KEPT_CHECKPOINTS + 1) * checkpoint + 2 * tuned,
        "cache_bytes": sum(models.values()),
    }


def operations(counter: StepCounter, setup: TrainingSetup, counts: Data) -> dict[str, int]:
    """FLOPs of a token in a training step; a multiply-add is two.

    Backward through frozen weights costs one forward, with the weight's gradient two. Checkpointing
    runs the blocks' forward again. Attention: the unmasked half of QK and PV, 2·L·q·T.
    Source, where weights train: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
    """
    model, full = counter.model(), setup.lora is None
    blocks = 2.0 * model["per_token"]
    head = 2.0 * model["vocabulary"] * model["hidden"] * counts.supervised_share
    attention = 2.0 * model["layers"] * model["query"] * counts.mean_length
    adapter = 0.0 if full else 2.0 * counter.persistent(setup)["trainable"]
    backward = blocks + head + 2 * (attention + adapter) + (blocks + head if full else 0)
    again = blocks + attention + adapter if setup.gradient_checkpointing else 0.0
    forward = blocks + head + attention + adapter
    return {"forward": round(forward), "backward": round(backward), "second_forward": round(again)}
