"""This machine: what it fits and how long it takes. For a terminal, and never in an out of DVC."""

from dataclasses import replace
from pathlib import Path

from stages.plan import figures, named, operations, table, techniques
from stages.plan.data import Data
from stages.plan.settings import Params
from stages.shared import fitting, peak
from stages.shared.core.machine import device, machine
from stages.shared.fitting import GIB, Request
from stages.shared.refusal import refusal
from stages.shared.step.adapter_sizes import of_parameters
from stages.shared.tensors import Model, parameter_count
from stages.shared.total_memory import total_memory_bytes
from stages.shared.tuning import Device, Tuning

LARGER = ("Qwen1.5-0.5B", "Llama-3-8B", "Llama-3-70B")
DEVICES = (1, 2, 8)


def described(config: Path, model: Model, found: Data, values: Params, budget: float | None) -> str:
    """What params.yaml's training takes here, in memory and in time.

    Args:
        config: the model's `config.json`.
        model: that it describes.
        found: the data.
        values: the parameters.
        budget: GiB; None for this machine's memory, or QLORA_MEMORY_BUDGET.
    """
    from stages.plan.calibration import operations_per_second  # noqa: PLC0415  (imports torch)
    from stages.shared.architecture import model_of_config  # noqa: PLC0415
    from stages.shared.weights.precision import has_bf16_matmuls  # noqa: PLC0415

    where = device()
    kind: Device = "cuda" if where.type == "cuda" else "cpu"
    total = total_memory_bytes(kind, budget)
    asked = figures.request(
        model, of_parameters(model.tensors, values.lora), values, found, total, kind
    )
    if kind == "cpu":
        tuning = replace(asked.tuning, bf16=has_bf16_matmuls(kind))
        workers = fitting.most_workers(values.train.batch_size, machine().workers)
        asked = replace(asked, tuning=tuning, workers=workers)
    choice = fitting.choose(asked)
    lines = [f"this machine ({kind}, {total / GIB:.1f} GiB)", *_fitting(asked)]
    if choice is None:
        return "\n".join([*lines, f"  {refusal(asked)}"])
    side_by_side = f", {choice.workers} side by side" if choice.workers > 1 else ""
    lines.append(f"  {table.choice(figures.chosen(asked))}{side_by_side}")
    tuning = replace(asked.tuning, gradient_checkpointing=choice.gradient_checkpointing)
    rate = operations_per_second(config, tuning, where)
    lines.append(f"  one block computes {rate / 1e9:,.0f} billion operations a second here;")
    lines.append(
        f"  an epoch of {found.tokens:,} tokens at that rate, in hours, on so many such devices:"
    )
    lines.append(f"  {'':16}" + "".join(f"{count:>10}" for count in DEVICES))
    models = {"this model": model} | {
        n: model_of_config(named.CONFIGS / f"{n}.json") for n in LARGER
    }
    for name, one in models.items():
        lora = of_parameters(one.tensors, values.lora)
        way = replace(tuning, adapter=lora if tuning.adapter else None)
        hours = epoch_seconds(one, way, found, rate) / 3600
        cells = "".join(f"{hours / count:>10,.2f}" for count in DEVICES)
        lines.append(f"  {name:16}{cells}  {parameter_count(one.tensors) / 1e9:.2f}e9 parameters")
    return "\n".join(lines)


def _fitting(asked: Request) -> list[str]:
    """Which techniques fit, and which do not, in micro-batches as those of the table."""
    lora = asked.instead_of_full or asked.tuning.adapter
    if lora is None:
        return []
    batches = asked.workload.micro_batches(figures.MICRO_BATCH_TOKENS)
    found: dict[bool, list[str]] = {True: [], False: []}
    for name, way in techniques.standard(lora).items():
        if way.paged:
            continue
        here = replace(way, device=asked.tuning.device, bf16=asked.tuning.bf16)
        prediction = peak.largest(asked.model, here, batches)
        found[fitting.fits(asked.model, here, prediction, asked.total_bytes)].append(name)
    words = {True: "fits", False: "does not fit"}
    return [f"  {words[fits]}: {', '.join(names)}" for fits, names in found.items() if names]


def epoch_seconds(model: Model, tuning: Tuning, found: Data, rate: float) -> float:
    """Operations of all training tokens over the operations a second."""
    cost = operations.of_token(model, tuning, found.supervised_share, found.mean_length)
    return cost.total * found.tokens / rate
