"""This machine's memory and speed, for a terminal, never in an output of DVC."""

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.plan import figures, output
from stages.plan.config import CONFIGS, Data, Params
from stages.shared.core.errors import UserError
from stages.shared.core.machine import device, machine
from stages.shared.parallel.placement import GIB, total_memory_bytes
from stages.shared.step.memory import fit
from stages.shared.step.memory.fit import Request
from stages.shared.step.memory.predict import StepCounter
from stages.shared.step.memory.setup import Device, TrainingSetup, lora_of
from stages.shared.weights import precision

LARGER = "Qwen1.5-0.5B", "Llama-3-8B", "Qwen3-30B-A3B", "gpt-oss-20b", "Mixtral-8x7B", "Llama-3-70B"
DEVICES = (1, 2, 8)
TOKENS, REPEATS = 256, 3  # of the calibration
SMALL_VOCABULARY = 256  # the head is not timed


def describe(
    counter: StepCounter, counts: Data, values: Params, options: Namespace
) -> Iterator[str]:
    """Lines on memory and time of params.yaml's training here, with `--budget` and `--devices`."""
    target = device()
    device_type: Device = "cuda" if target.type == "cuda" else "cpu"
    total = total_memory_bytes(device_type, options.budget)
    setup = figures.configured(values, device_type, bf16=precision.has_bf16_matmuls(device_type))
    here = torch.cuda.device_count() if device_type == "cuda" else 1
    devices = options.devices or machine().devices or here
    request = figures.request_of(counter, values, counts, setup, total, devices)
    yield f"this machine ({device_type}, {total / GIB:.1f} GiB)"
    choice = fit.choose(request)
    if choice is None:
        yield f"  {fit.refusal(request)}"
        return
    yield f"  {output.choice(figures.chosen(request, choice))}"
    holder = "each device" if device_type == "cuda" else "all processes"
    holder = "the process" if devices == 1 else holder
    sharded = f", weights sharded over {devices}" if choice.shards > 1 else ""
    yield f"  {holder} will hold about {choice.device_bytes / GIB:.2f} GiB{sharded}"
    yield from _fitting(request, values)
    setup = replace(setup, gradient_checkpointing=choice.gradient_checkpointing)
    rate = operations_per_second(counter, setup, target)
    yield f"  one block computes {rate / 1e9:,.0f} billion operations a second here;"
    yield f"  an epoch of {counts.tokens:,} tokens at that rate, in hours, on so many such devices:"
    rows = {}
    for name in ("this model", *LARGER):
        one = counter if name == "this model" else StepCounter(CONFIGS / f"{name}.json")
        hours = sum(figures.operations(one, setup, counts).values()) * counts.tokens / rate / 3600
        sizes = one.model()["parameters"]
        parameters = {f"10⁹ {key}": sizes[key] / 1e9 for key in ("parameters", "active")}
        rows[name] = {str(count): hours / count for count in DEVICES} | parameters
    yield output.indented(pd.DataFrame(rows).T.map("{:,.2f}".format))


def _fitting(request: Request, values: Params) -> Iterator[str]:
    """Lines of the techniques that fit and of those that do not, with whole weights."""
    groups: dict[str, list[str]] = {"fits": [], "does not fit": []}
    request = replace(request, micro_batch_tokens=figures.MICRO_BATCH_TOKENS, shards=(1,))
    for name, way in figures.techniques(lora_of(values.lora)).items():
        compute = request.setup.compute if way.compute == "bf16" else way.compute
        setup = replace(way, device=request.setup.device, compute=compute)
        tried = replace(request, setup=setup, gradient_checkpointing=way.gradient_checkpointing)
        with suppress(UserError):  # left out
            if not name.endswith(figures.PAGED):
                fits = fit.fits(tried, fit.smallest(tried))
                groups["fits" if fits else "does not fit"].append(name)
    yield from (f"  {words}: {', '.join(names)}" for words, names in groups.items() if names)


def operations_per_second(
    counter: StepCounter, setup: TrainingSetup, target: torch.device
) -> float:
    """FLOP/s of a random frozen dense block, forward and backward; the best run counts."""
    config = AutoConfig.from_pretrained(counter.config, trust_remote_code=False)
    text = config.get_text_config()
    layers, text.vocab_size = text.num_hidden_layers, SMALL_VOCABULARY
    text.num_hidden_layers = 1
    for key in {"num_experts", "num_local_experts"} & vars(text).keys():
        setattr(text, key, text.num_experts_per_tok)  # those that a token uses take the time
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    dtype = precision.DTYPES[setup.compute]
    with torch.device(target):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
        inputs = torch.randn(1, TOKENS, text.hidden_size, dtype=dtype, requires_grad=True)

    def seconds() -> float:
        started = time.perf_counter()
        with precision.autocast(target, dtype):
            logits = model(inputs_embeds=inputs, use_cache=False).logits
        logits.sum().backward()
        if target.type == "cuda":
            torch.cuda.synchronize(target)
        return time.perf_counter() - started

    best = min(seconds() for _ in range(REPEATS + 1))
    forward = 2 * counter.model()["per_token"] / layers * TOKENS
    return 2 * forward / best  # backward through frozen weights costs the same
