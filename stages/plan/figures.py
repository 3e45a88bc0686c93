"""Figures of the plan: a pure function of config, data and parameters."""

from dataclasses import replace
from typing import Any

from stages.plan import data, techniques
from stages.plan.config import Params
from stages.plan.data import Data
from stages.shared.core.errors import UserError
from stages.shared.parallel.limits import GIB
from stages.shared.step.memory import fit
from stages.shared.step.memory.fit import Choice, Request
from stages.shared.step.memory.predict import StepCounter
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


def configured(values: Params, device: Device = "cuda", *, bf16: bool = True) -> TrainingSetup:
    """The setup of params.yaml; `UserError` for full tuning of quantized weights."""
    precision = values.quantize.precision
    if values.train.method == "full" and precision not in ("fp32", "bf16"):
        raise UserError(
            f"params.yaml: train.method is 'full' and quantize.precision is {precision!r}. "
            "Set quantize.precision to fp32 or bf16, or train.method to lora."
        )
    return setup_of(values.quantize, values.lora, values.train, device, bf16=bf16)


def request(
    counter: StepCounter,
    values: Params,
    counts: Data,
    setup: TrainingSetup,
    total_bytes: int,
    devices: int = 1,
) -> Request:
    """A training within `total_bytes` a device, with only counts of the data known.

    Devices of a CPU are processes that share them.
    """
    work = workload_of_counts(counts.longest, values.train.batch_size, counts.supervised_share)
    return Request(
        counter,
        setup,
        work,
        total_bytes,
        processes=devices if setup.device == "cpu" else 1,
        shards=fit.shard_counts(setup, devices),
        instead_of_full=lora_of(values.lora),
    )


def plan(counter: StepCounter, counts: Data, values: Params) -> dict[str, Any]:
    """All figures, nested as in `reports/plan.json`."""
    setup, model = configured(values), counter.model()
    requested = request(counter, values, counts, setup, 0)
    batches = requested.workload.micro_batches(MICRO_BATCH_TOKENS)
    batch = max(batches, key=lambda one: one.tokens)
    compared = {"configured": techniques.figures(counter, "configured", setup, batch)}
    left_out = {}
    for name, way in techniques.standard(lora_of(values.lora)).items():
        try:
            compared[name] = techniques.figures(counter, name, way, batch)
        except UserError as error:  # modules_to_save on quantized weights, say
            left_out[name] = str(error)
    lora = replace(setup, lora=lora_of(values.lora))
    return {
        "note": NOTE,
        "model": model["parameters"],
        "adapter": {"parameters": counter.persistent(lora)["trainable"]},
        "training": data.schedule(counts, values.train),
        "micro_batch": {"tokens": batch.tokens, "supervised": batch.supervised},
        "techniques": compared,
        "left_out": left_out,
        "configured_on": {
            card: {
                **chosen(replace(requested, total_bytes=gib * GIB)),
                "instead_of_bf16": techniques.instead_of_bf16(card, setup),
            }
            for card, gib in techniques.CARDS_GIB.items()
        },
        "disk": disk(counter, setup),
        "operations_per_token": operations(counter, setup, counts),
    }


def on_devices(counter: StepCounter, counts: Data, values: Params, devices: int) -> dict[str, Any]:
    """Training on several GPUs of each size, with all weights on each or a part: plans by way."""
    setup = configured(values)
    ways = {"whole": 1, "sharded": fit.shard_counts(setup, devices)[-1]}
    requested = request(counter, values, counts, setup, 0)
    return {
        f"{devices} × {gib} GiB": {
            way: chosen(replace(requested, total_bytes=gib * GIB, shards=(parts,)))
            for way, parts in ways.items()
        }
        for gib in sorted(set(techniques.CARDS_GIB.values()))
    }


def chosen(requested: Request, choice: Choice | None = None) -> dict[str, Any]:
    """The step's execution plan within the requested memory, or that it does not fit."""
    choice = choice or fit.choose(requested)
    if choice is None:
        return {"fits": False, "peak_bytes": fit.smallest(requested).prediction.total_bytes}
    return {
        "fits": True,
        "peak_bytes": choice.prediction.total_bytes,
        "micro_batch_tokens": choice.micro_batch_tokens,
        "gradient_checkpointing": choice.gradient_checkpointing,
    }


def growth(counter: StepCounter, values: Params, counts: Data) -> dict[str, list[int]]:
    """Peak bytes of LoRA and QLoRA for one conversation of each of `LENGTHS` tokens."""
    ways = techniques.standard(lora_of(values.lora))
    drawn = {"LoRA bf16": ways["lora_bf16"], "QLoRA nf4": ways["qlora_nf4_double"]}
    drawn |= {
        f"{name}, checkpointed": replace(way, gradient_checkpointing=True)
        for name, way in drawn.items()
    }
    return {
        name: [
            counter.predict(way, MicroBatch((n,), round(n * counts.supervised_share))).total_bytes
            for n in LENGTHS
        ]
        for name, way in drawn.items()
    }


def disk(counter: StepCounter, setup: TrainingSetup) -> dict[str, int]:
    """Bytes on disk: models (the base in bf16), checkpoints while it trains, DVC's cache."""
    held, parameters = counter.persistent(setup), counter.model()["parameters"]["parameters"]
    trained = 4 * held["trainable"]
    checkpoint = trained + held["optimizer"]
    tuned = trained if setup.lora else MERGED_BYTES * parameters
    full_bytes = DENSE_BYTES[setup.stored] * parameters
    models = {
        "base_bytes": 2 * parameters,
        "quantized_bytes": held["weights"] if setup.lora else full_bytes,
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
