"""This machine: what it fits and how long it takes. For a terminal, never in an out of DVC."""

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.plan import figures, sources, tables, techniques
from stages.plan.config import Params
from stages.plan.data import Data
from stages.shared.core.errors import UserError
from stages.shared.core.machine import device, machine
from stages.shared.step import fit
from stages.shared.step.count import StepCounter
from stages.shared.step.fit import Request
from stages.shared.step.limits import GIB, total_memory_bytes
from stages.shared.step.setup import Device, TrainingSetup, lora_of
from stages.shared.weights import precision

LARGER = ("Qwen1.5-0.5B", "Llama-3-8B", "Llama-3-70B")
DEVICES = (1, 2, 8)
TOKENS, REPEATS = 256, 3  # of the calibration
SMALL_VOCABULARY = 256  # the head is no part of what is timed


def described(
    counter: StepCounter, found: Data, values: Params, budget: float | None
) -> Iterator[str]:
    """Lines on params.yaml's training here: memory, and time.

    Args:
        counter: of the model.
        found: the data.
        values: the parameters.
        budget: GiB; None for this machine's memory, or QLORA_MEMORY_BUDGET.
    """
    place = device()
    kind: Device = "cuda" if place.type == "cuda" else "cpu"
    total = total_memory_bytes(kind, budget)
    setup = figures.configured(values, kind, bf16=precision.has_bf16_matmuls(kind))
    asked = figures.request(counter, values, found, setup, total)
    if kind == "cpu":
        workers = fit.most_workers(values.train.batch_size, machine().workers)
        asked = replace(asked, workers=workers)
    yield f"this machine ({kind}, {total / GIB:.1f} GiB)"
    choice = fit.choose(asked)
    if choice is None:
        yield f"  {fit.refusal(asked)}"
        return
    beside = f", {choice.workers} workers" if choice.workers > 1 else ""
    yield f"  {tables.choice(figures.chosen(asked, choice))}{beside}"
    yield f"  the process will hold about {choice.device_bytes / GIB:.2f} GiB"
    yield from _fitting(asked, values)
    setup = replace(setup, gradient_checkpointing=choice.gradient_checkpointing)
    rate = operations_per_second(counter, setup, place)
    yield f"  one block computes {rate / 1e9:,.0f} billion operations a second here;"
    yield f"  an epoch of {found.tokens:,} tokens at that rate, in hours, on so many such devices:"
    yield f"  {'':16}" + "".join(f"{count:>10}" for count in DEVICES)
    for name in ("this model", *LARGER):
        path = counter.config if name == "this model" else sources.CONFIGS / f"{name}.json"
        with StepCounter(path) as one:
            cost = sum(figures.operations(one, setup, found).values())
            parameters = one.model()["parameters"]["parameters"]
        hours = cost * found.tokens / rate / 3600
        cells = "".join(f"{hours / count:>10,.2f}" for count in DEVICES)
        yield f"  {name:16}{cells}  {parameters / 1e9:.2f}e9 parameters"


def _fitting(asked: Request, values: Params) -> Iterator[str]:
    """Techniques that fit and that do not, in micro-batches as those of the table."""
    batches = asked.workload.micro_batches(figures.MICRO_BATCH_TOKENS)
    found: dict[str, list[str]] = {"fits": [], "does not fit": []}
    for name, way in techniques.standard(lora_of(values.lora)).items():
        compute = asked.setup.compute if way.compute == "bf16" else way.compute
        here = replace(way, device=asked.setup.device, compute=compute)
        if name.endswith(techniques.PAGED):
            continue
        try:
            prediction = asked.counter.largest(here, batches)
        except UserError:
            continue
        needed = fit.device_bytes(asked.counter, here, prediction) * fit.MARGIN[here.device]
        found["fits" if needed <= asked.total_bytes else "does not fit"].append(name)
    yield from (f"  {words}: {', '.join(names)}" for words, names in found.items() if names)


def operations_per_second(counter: StepCounter, setup: TrainingSetup, place: torch.device) -> float:
    """Of one block with random, frozen, dense weights, forward and backward; the best of three."""
    config = AutoConfig.from_pretrained(counter.config, trust_remote_code=False)
    text = config.get_text_config()
    layers, text.vocab_size = text.num_hidden_layers, SMALL_VOCABULARY
    text.num_hidden_layers = 1
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    dtype = precision.DTYPES[setup.compute]
    with torch.device(place):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
        inputs = torch.randn(1, TOKENS, text.hidden_size, dtype=dtype, requires_grad=True)
    best = min(_seconds(model, inputs, place, dtype) for _ in range(REPEATS + 1))
    forward = 2 * counter.model()["per_token"] / layers * TOKENS
    return 2 * forward / best  # backward through frozen weights costs the same


def _seconds(
    model: torch.nn.Module, inputs: torch.Tensor, place: torch.device, dtype: torch.dtype
) -> float:
    started = time.perf_counter()
    with precision.autocast(place, dtype):
        logits = model(inputs_embeds=inputs, use_cache=False).logits
    logits.sum().backward()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter() - started
