"""The figures of the plan: a pure function of tensors, counts and parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import ceil
from typing import Any, get_args

from stages.plan import techniques
from stages.plan.settings import Lora, Params, Train
from stages.plan.techniques import Adapter
from stages.shared.errors import UserError
from stages.shared.memory import Persistent
from stages.shared.tensors import Kind, Tensor, lora_targets, parameter_count

NOTE = (
    "persistent_bytes: weights, adapter, gradients and optimizer states. Activations, logits, "
    "workspaces and the device's own context come on top and are not in it."
)


def adapter(tensors: Sequence[Tensor], lora: Lora) -> Adapter:
    """The adapter that the parameters ask for.

    Raises:
        UserError: `lora.target_modules` match no layer.
    """
    found = techniques.adapter_of(
        tensors,
        rank=lora.r,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        bias=lora.bias,
        dora=lora.dora,
    )
    if not lora_targets(tensors, lora.target_modules, lora.modules_to_save):
        names = sorted({t.module.rpartition(".")[2] for t in tensors if t.kind == "linear"})
        raise UserError(
            f"params.yaml: lora.target_modules is {lora.target_modules!r} and matches no layer of "
            f"the model; expected all-linear, or names or a pattern among {', '.join(names)}"
        )
    return found


def configured(tensors: Sequence[Tensor], lora_adapter: Adapter, values: Params) -> Persistent:
    """What `params.yaml` asks for.

    Raises:
        UserError: a full fine-tune of weights that cannot be trained.
    """
    precision, optimizer = values.quantize.precision, values.train.optimizer
    if values.train.method == "lora":
        return techniques.lora(
            tensors,
            lora_adapter,
            precision,
            double_quant=values.quantize.double_quant,
            dense=values.quantize.compute_dtype,
            optimizer=optimizer,
        )
    if precision not in ("fp32", "bf16"):
        raise UserError(
            f"params.yaml: train.method is 'full' and quantize.precision is {precision!r}; full "
            "fine-tuning needs fp32 or bf16; change one of the two"
        )
    return techniques.full(tensors, "fp32", optimizer)  # bf16 too: it trains fp32 masters


def schedule(counts: Mapping[str, Any], train: Train) -> dict[str, int]:
    """How much training there is, if it does not stop early.

    Args:
        counts: `reports/prepare.json`.
        train: epochs, conversations a step and the limit of steps.

    Raises:
        UserError: the counts are not those that `prepare` writes.
    """
    try:
        conversations, tokens = counts["train"]["conversations"], counts["train"]["tokens"]
        steps = train.epochs * ceil(conversations / train.batch_size)
        tokens_per_step = round(tokens / conversations * min(train.batch_size, conversations))
    except (KeyError, TypeError, ZeroDivisionError):
        raise UserError(
            "reports/prepare.json: no train.conversations and train.tokens above zero; expected "
            "what `prepare` writes; run `dvc repro prepare`"
        ) from None
    return {
        "steps": min(steps, train.max_steps or steps),
        "conversations": conversations,
        "tokens": tokens,
        "tokens_per_step": tokens_per_step,
    }


def plan(tensors: Sequence[Tensor], counts: Mapping[str, Any], values: Params) -> dict[str, Any]:
    """All figures, nested as `reports/plan.json` has them."""
    lora_adapter = adapter(tensors, values.lora)
    ways = {
        "configured": configured(tensors, lora_adapter, values),
        **techniques.standard(tensors, lora_adapter),
    }
    return {
        "note": NOTE,
        "model": {
            "parameters": parameter_count(tensors),
            **{kind: parameter_count(tensors, kind) for kind in get_args(Kind)},
            "quantizable": sum(t.size for t in tensors if t.quantizable),
        },
        "adapter": {"parameters": lora_adapter.trainable},
        "training": schedule(counts, values.train),
        "techniques": {name: _as_json(way) for name, way in ways.items()},
    }


def _as_json(way: Persistent) -> dict[str, Any]:
    return {
        **asdict(way),
        "persistent_bytes": way.persistent_bytes,
        "persistent_fits": techniques.fits(way),
    }
