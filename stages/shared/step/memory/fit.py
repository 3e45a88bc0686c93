"""Settings of the machine that fit its memory: the fastest of them, or remedies if none do.

A pure function of the model, the parameters, the data and the machine's cores and total memory:
never of free memory or of a timing, so that the same machine always computes in the same way.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from stages.shared.parallel.placement import GIB
from stages.shared.step.memory.predict import TRANSIENT, Prediction, StepCounter
from stages.shared.step.memory.setup import Device, MicroBatch, TrainingSetup, Workload, decisive

# Larger micro-batches gain nothing more. On a CPU: 300 tokens/s at 1,024 and 295 at 2,048.
MICRO_BATCH_TOKENS = {"cuda": (8192, 4096, 2048, 1024, 512, 256), "cpu": (1024, 512, 256, 128)}
# Tokens that take as long as what a micro-batch costs however short it is: dequantizing, and the
# host's work. On an H200 8,192 tokens of an 8B took 0.51 s and 2,048 of a 7B 0.23 s.
FIXED_TOKENS = {"cuda": 3000, "cpu": 20}

# A CPU's process, fitted to eight trainings (docs/memory.md): Python with its libraries, and pages
# held for each byte that lives within a step.
PROCESS_BYTES = 700 * 10**6
PAGES_PER_BYTE = 1.6
# A training is refused where its prediction and this share of it more are not there.
MARGIN = {"cpu": 1.1, "cuda": 1.0}
# CUDA's context with its kernels, an assumption; a segment of the allocator that is not full; the
# workspaces of cuBLAS and cuBLASLt on Hopper; half of the allocator's 512 bytes a tensor.
CONTEXT_BYTES = 768 * 2**20
ALLOCATOR_BYTES = 20 * 2**20
MATMUL_BYTES = 2 * 32 * 2**20
ROUNDING_BYTES = 256
MORE_DEVICES = {2: "two", 4: "four", 8: "eight"}


@dataclass(frozen=True)
class Request:
    """A training, and the memory that it may take."""

    counter: StepCounter
    setup: TrainingSetup  # its `gradient_checkpointing` is not read
    workload: Workload
    total_bytes: int  # of the machine's memory, or the budget
    micro_batch_tokens: int | None = None  # None to choose
    gradient_checkpointing: bool | None = None  # None to choose
    scored: frozenset[MicroBatch] = frozenset()  # of held-out conversations, between steps
    processes: int = 1  # of a CPU, that share a step and this memory
    shards: tuple[int, ...] = (1,)  # devices that divide matrices; the first that fits
    instead_of_full: dict[str, Any] | None = None  # `lora_of` a training instead


@dataclass(frozen=True)
class Choice:
    """Settings that a step is computed with."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    prediction: Prediction
    device_bytes: int  # that a device, or a CPU's processes, will hold
    shards: int = 1  # devices that divide matrices, 1 where each holds all


def shard_counts(processes: int, shard: str = "auto") -> tuple[int, ...]:
    """`Request.shards` of so many devices; `shard` is `QLORA_SHARD`."""
    if processes == 1 or shard == "false":
        return (1,)
    return (processes,) if shard == "true" else (1, processes)


def choose(request: Request) -> Choice | None:
    """The fastest of the settings that fit; None if none does."""
    counted = (_count(request, *settings) for settings in _settings(request))
    return next((choice for choice in counted if fits(request, choice)), None)


def smallest(request: Request) -> Choice:
    """The settings that need the least memory, whether they fit or not."""
    least = request.micro_batch_tokens or MICRO_BATCH_TOKENS[request.setup.device][-1]
    checkpointing = request.gradient_checkpointing is not False
    return _count(request, request.shards[-1], least, checkpointing)


def fits(request: Request, choice: Choice) -> bool:
    """Whether there is enough memory, with a margin."""
    return MARGIN[request.setup.device] * choice.device_bytes <= request.total_bytes


def device_bytes(counter: StepCounter, setup: TrainingSetup, prediction: Prediction) -> int:
    """Memory that a GPU must have, or that a CPU's process holds: beside tensors too.

    Sources: torch 2.13, c10/cuda/CUDACachingAllocator.cpp, `kMinBlockSize`, `kLargeBuffer`;
    aten/src/ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`.
    """
    if setup.device == "cuda":
        rounding = ROUNDING_BYTES * counter.persistent(setup)["tensors"]
        overhead = CONTEXT_BYTES + ALLOCATOR_BYTES + MATMUL_BYTES + rounding
        return prediction.total_bytes + overhead
    pages = int((PAGES_PER_BYTE - 1) * sum(prediction.parts[name] for name in TRANSIENT))
    return PROCESS_BYTES + prediction.total_bytes + pages


def _settings(request: Request) -> list[tuple[int, int, bool]]:
    """Shards, tokens and checkpointing: whole weights first, then the fastest."""
    tokens, checkpointing = request.micro_batch_tokens, request.gradient_checkpointing
    device = request.setup.device
    settings = product(
        request.shards,
        [tokens] if tokens else MICRO_BATCH_TOKENS[device],
        (False, True) if checkpointing is None else (checkpointing,),
    )
    return sorted(settings, key=lambda one: (one[0], cost(device, one[1], one[2])))


def cost(device: Device, tokens: int, checkpointing: bool) -> float:
    """Time of a token, in passes over the weights: forward, backward, and forward again."""
    return (3 if checkpointing else 2) * (1 + FIXED_TOKENS[device] / tokens)


def _count(request: Request, shards: int, tokens: int, checkpointing: bool) -> Choice:
    """The peak of a training with these settings, and of its scoring."""
    counter = request.counter
    setup = replace(request.setup, gradient_checkpointing=checkpointing)
    batches, scored = decisive(request.workload.micro_batches(tokens)), decisive(request.scored)
    predictions = [counter.predict(setup, batch, shards) for batch in batches]
    predictions += [counter.predict_scoring(setup, batch, shards) for batch in scored]
    held = [device_bytes(counter, setup, prediction) for prediction in predictions]
    prediction = predictions[held.index(max(held))]
    return Choice(tokens, checkpointing, prediction, max(held) * request.processes, shards)


def refusal(request: Request) -> str:
    """One line for a training that `choose` finds no settings for: its parts, and remedies."""
    least = smallest(request)
    parts = least.prediction.parts
    needed = MARGIN[request.setup.device] * least.device_bytes
    listed = ", ".join(f"{n} {size / GIB:.2f}" for n, size in parts.items() if size >= GIB / 200)
    checkpointing = "on" if least.gradient_checkpointing else "off"
    changes = remedies(request)
    advice = f"Set {'; or '.join(changes)}." if changes else "Take a smaller model or more memory."
    if devices := more_devices(request):
        advice += f" Or train on {devices} devices, sharded."
    return (
        f"memory: training needs {needed / GIB:.2f} GiB ({listed}, beside "
        f"tensors {(needed - sum(parts.values())) / GIB:.2f}) at "
        f"{least.micro_batch_tokens} tokens a micro-batch, checkpointing {checkpointing}; there "
        f"are {request.total_bytes / GIB:.2f}. {advice}"
    )


def more_devices(request: Request) -> str | None:
    """The least of two, four or eight GPUs that hold it, each with its part of the weights."""
    for count, words in MORE_DEVICES.items():
        wider = replace(request, shards=(count,))
        more = request.setup.device == "cuda" and count > request.shards[-1]
        if more and fits(wider, smallest(wider)):
            return words
    return None


def remedies(request: Request) -> list[str]:
    """Changes that each make it fit alone; else the first few in order that do so together."""
    changes = list(_changes(request))
    alone = [words for words, changed in changes if fits(changed, smallest(changed))]
    if alone:
        return alone[:3]
    together: dict[str, str] = {}  # each key once, in order
    while following := [c for c in _changes(request) if c[0].split()[0] not in together]:
        words, request = following[0]
        together[words.split()[0]] = words
        if len(together) > 1 and fits(request, smallest(request)):
            return [" and ".join(together.values())]
    return []


def _changes(request: Request) -> Iterator[tuple[str, Request]]:
    """Remedies in a fixed order: first those that change no result, then the least harmful."""
    setup, lora = request.setup, request.setup.lora
    least = MICRO_BATCH_TOKENS[setup.device][-1]
    if (request.micro_batch_tokens or 0) > least:
        yield f"QLORA_MICRO_BATCH_TOKENS={least}", replace(request, micro_batch_tokens=least)
    if request.gradient_checkpointing is False:
        yield "QLORA_GRADIENT_CHECKPOINTING=true", replace(request, gradient_checkpointing=True)
    if request.processes > 1:
        yield "QLORA_DEVICES=1", replace(request, processes=1)

    def tried(words: str, **changed: Any) -> tuple[str, Request]:
        return words, replace(request, setup=replace(setup, **changed))

    if setup.precision in ("fp4", "nf4") and not setup.double_quant:
        yield tried("quantize.double_quant true", double_quant=True)
    if setup.optimizer == "adamw":
        yield tried("train.optimizer adamw_8bit", optimizer="adamw_8bit")
    if lora and lora["r"] > 8:
        yield tried("lora.r 8", lora=lora | {"r": 8})
    length = 2 ** max(6, math.ceil(math.log2(request.workload.longest)) - 1)
    if length < request.workload.longest:
        cut = replace(request, workload=request.workload.cut(length))
        yield f"prepare.max_length {length}", cut
    if lora and setup.precision not in ("fp4", "nf4"):
        yield tried("quantize.precision nf4", precision="nf4", double_quant=True)
    if lora is None and request.instead_of_full:
        yield tried("train.method lora", lora=request.instead_of_full)
