"""The figures of the plan: a pure function of the model, the data and the parameters."""

from dataclasses import asdict, replace
from typing import Any, get_args

from stages.plan import data, disk, operations, techniques
from stages.plan.data import Data
from stages.plan.settings import Params
from stages.shared import fitting, memory, peak, workload
from stages.shared.core.errors import UserError
from stages.shared.fitting import GIB, Request
from stages.shared.peak import PARTS
from stages.shared.step import adapter_sizes as adapter
from stages.shared.step.adapter_sizes import Adapter
from stages.shared.tensors import Kind, Model, parameter_count
from stages.shared.tuning import Device, Tuning

NOTE = (
    "Predicted peaks of live tensors in a training step on CUDA, by part. The formulas were held "
    "against steps on a CPU and on one GPU. A card must hold an assumed context besides."
)
MICRO_BATCH_TOKENS = 2048  # of the comparison, where the data has so many


def configured(lora_adapter: Adapter, values: Params, device: Device = "cuda") -> Tuning:
    """What `params.yaml` asks for.

    Raises:
        UserError: a full fine-tune of weights that cannot be trained.
    """
    precision = values.quantize.precision
    full = values.train.method == "full"
    if full and precision not in ("fp32", "bf16"):
        raise UserError(
            f"params.yaml: train.method is 'full' and quantize.precision is {precision!r}; full "
            "fine-tuning needs fp32 or bf16; change one of the two"
        )
    return Tuning(
        precision,
        None if full else lora_adapter,
        double_quant=values.quantize.double_quant,
        compute=values.quantize.compute_dtype,
        optimizer=values.train.optimizer,
        dropout=values.lora.dropout > 0,
        device=device,
    )


def request(
    model: Model,
    lora_adapter: Adapter,
    values: Params,
    found: Data,
    total_bytes: int,
    device: Device = "cuda",
) -> Request:
    """What is to be trained with so much memory, where only counts of the data are known."""
    return Request(
        model,
        configured(lora_adapter, values, device),
        workload.of_counts(found.longest, values.train.batch_size, found.supervised_share),
        total_bytes,
        instead_of_full=lora_adapter,
    )


def plan(model: Model, found: Data, values: Params) -> dict[str, Any]:
    """All figures, nested as `reports/plan.json` has them."""
    lora_adapter = adapter.of_parameters(model.tensors, values.lora)
    asked = configured(lora_adapter, values)
    work = workload.of_counts(found.longest, values.train.batch_size, found.supervised_share)
    batch = max(work.micro_batches(MICRO_BATCH_TOKENS), key=lambda b: b.tokens)
    ways = {"configured": asked, **techniques.standard(lora_adapter)}
    cost = operations.of_token(model, asked, found.supervised_share, found.mean_length)
    return {
        "note": NOTE,
        "model": parameters(model),
        "adapter": {"parameters": lora_adapter.trainable},
        "training": data.schedule(found, values.train),
        "micro_batch": {"tokens": batch.tokens, "supervised": batch.supervised},
        "techniques": {name: _technique(model, way, batch) for name, way in ways.items()},
        "configured_on": {
            card: {
                **chosen(request(model, lora_adapter, values, found, gib * GIB)),
                "instead_of_bf16": techniques.instead_of_bf16(card, asked),
            }
            for card, gib in techniques.CARDS_GIB.items()
        },
        "disk": disk.needed(model, asked),
        "operations_per_token": {name: round(value) for name, value in asdict(cost).items()},
    }


def parameters(model: Model) -> dict[str, Any]:
    """Parameters by kind; attention and feed-forward matrices apart."""
    tensors = model.tensors
    attention = sum(t.size for t in tensors if t.kind == "linear" and "attn" in t.module)
    linear = parameter_count(tensors, "linear")
    return {
        "parameters": parameter_count(tensors),
        **{kind: parameter_count(tensors, kind) for kind in get_args(Kind)},
        "attention": attention,
        "mlp": linear - attention,
        "quantizable": sum(t.size for t in tensors if t.quantizable),
        "tied_head": any(t.tied and t.kind == "head" for t in tensors),
    }


def chosen(asked: Request) -> dict[str, Any]:
    """How a step would be computed with so much memory, or that it cannot be."""
    choice = fitting.choose(asked)
    if choice is None:
        least = fitting.smallest(asked)
        return {"fits": False, "peak_bytes": least.prediction.total_bytes}
    return {
        "fits": True,
        "peak_bytes": choice.prediction.total_bytes,
        "micro_batch_tokens": choice.micro_batch_tokens,
        "gradient_checkpointing": choice.gradient_checkpointing,
    }


def _technique(model: Model, way: Tuning, batch: peak.MicroBatch) -> dict[str, Any]:
    prediction = peak.predict(model, way, batch)
    persistent = way.persistent(model).persistent_bytes
    held = replace(prediction, parts={"persistent": persistent})
    return {
        **{f"{part}_bytes": prediction.parts[part] for part in PARTS},
        "persistent_bytes": persistent,
        "peak_bytes": prediction.total_bytes,
        "peak_at_least_bytes": prediction.lowest_bytes,
        "calibrated": prediction.calibrated,
        "pageable_bytes": memory.pageable_bytes(way.optimizer, way.trained_sizes(model)),
        "persistent_fits": techniques.cards_that_fit(model, way, held),
        "fits": techniques.cards_that_fit(model, way, prediction),
    }
