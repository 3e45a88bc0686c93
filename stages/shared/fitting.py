"""Which settings of the machine fit its memory, the fastest of them, and what to change if none.

Pure functions of the model, the parameters, the data and the machine's cores and total memory:
never of free memory or of a timing, so that the same machine always computes in the same way.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from stages.shared import peak
from stages.shared.peak import Prediction
from stages.shared.step.adapter_sizes import Adapter
from stages.shared.tensors import Model
from stages.shared.tuning import Tuning
from stages.shared.workload import Workload
from stages.shared.workspace import MicroBatch

GIB = 2**30
# Larger micro-batches gain nothing more. On a CPU: 300 tokens/s at 1,024 and 295 at 2,048.
MICRO_BATCH_TOKENS = {"cuda": (8192, 4096, 2048, 1024, 512, 256), "cpu": (1024, 512, 256, 128)}
# The most of each of several that work side by side: two at 512 are as fast as two at 1,024.
WORKER_TOKENS = 512
# Tokens that take as long as what a micro-batch costs however short it is: dequantizing, and what
# the host needs to tell a GPU all there is to do. Of an H200, where 8,192 tokens of an 8B took
# 0.51 s, and 2,048 of a 7B 0.23 s (docs/performance.md); it only orders candidates.
FIXED_TOKENS = {"cuda": 3000, "cpu": 20}
# Held beside live tensors. Of CUDA an assumption, a context with its kernels, until a GPU has
# measured it (benchmarks/memory_cuda.py); of a CPU the interpreter, its libraries and the products
# that they compile, measured: see docs/memory.md.
RESERVED_BYTES = {"cuda": 768 * 2**20, "cpu": 3 * GIB // 2}
# Of a CPU's tensors that come and go: freed pages that the C library's heap keeps between others.
HEAP_SHARE = 0.25
TRANSIENT = ("activations", "logits", "workspace")
# Of each that works beside the first on a CPU: its own interpreter's pages, and products.
WORKER_BYTES = 128 * 2**20
# Each dequantizes the weights for itself, and holds activations. Two have been measured.
MOST_WORKERS = 4
# Alone, with all cores, a step takes longer; measured on two (docs/performance.md).
ALONE = 1.1
ALLOCATION_ROUNDING = 512  # CUDA's allocator hands out multiples of it
SEGMENT_BYTES = 20 * 2**20  # and holds one such segment that is not full, at the least
# Of cuBLAS, and of cuBLASLt, on Hopper: 59 to 66 MiB were found beside what was predicted.
PRODUCTS_WORKSPACE_BYTES = 2 * 32 * 2**20


@dataclass(frozen=True)
class Choice:
    """How a step is computed, and the memory that it takes."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    prediction: Prediction
    workers: int = 1


@dataclass(frozen=True)
class Request:
    """What is to be trained, on what, with how much memory.

    Attributes:
        model: from `architecture.model_of_config`.
        tuning: as the parameters say; its `gradient_checkpointing` is not looked at.
        workload: the conversations.
        total_bytes: of the machine's memory, or the budget.
        micro_batch_tokens: None to choose.
        gradient_checkpointing: None to choose.
        instead_of_full: the adapter that could be trained instead of all weights.
        scored: the micro-batches that held-out conversations are scored in, between steps.
        workers: the most processes of a CPU that compute parts of a step, see `packing.partition`.
    """

    model: Model
    tuning: Tuning
    workload: Workload
    total_bytes: int
    micro_batch_tokens: int | None = None
    gradient_checkpointing: bool | None = None
    instead_of_full: Adapter | None = None
    scored: frozenset[MicroBatch] = frozenset()
    workers: int = 1


def most_workers(batch_size: int, wanted: int | None = None) -> int:
    """How many processes of this machine's CPU may compute a step: a core for each, at least.

    Args:
        batch_size: conversations a step; each needs one.
        wanted: as many as the user asks for, if any.
    """
    return min(wanted or min(len(os.sched_getaffinity(0)), MOST_WORKERS), batch_size)


def device_bytes(model: Model, tuning: Tuning, prediction: Prediction, workers: int = 1) -> int:
    """What a device must have: live tensors, the allocator's rounding, and what else runs there.

    On CUDA half of 512 bytes is lost with each tensor on average, and a part of a segment, and
    products have a workspace. On a CPU it is an allowance for the whole process: the most that was
    seen, rounded up.

    Source: torch 2.13, c10/cuda/CUDACachingAllocator.cpp, `kMinBlockSize`, `kLargeBuffer`;
    aten/src/ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`.
    """
    reserved = RESERVED_BYTES[tuning.device]
    if tuning.device == "cuda":
        tensors = len(model.tensors) + 4 * len(tuning.trained_sizes(model))
        reserved += SEGMENT_BYTES + PRODUCTS_WORKSPACE_BYTES + tensors * ALLOCATION_ROUNDING // 2
    else:
        reserved += int(HEAP_SHARE * sum(prediction.parts[name] for name in TRANSIENT))
        reserved += WORKER_BYTES * (workers - 1)
    return prediction.total_bytes + reserved


def fits(
    model: Model, tuning: Tuning, prediction: Prediction, total_bytes: int, workers: int = 1
) -> bool:
    """Whether a device with so much memory can do it."""
    return device_bytes(model, tuning, prediction, workers) <= total_bytes


def choose(request: Request) -> Choice | None:
    """The fastest of the settings that fit; None if none does.

    Checkpointing is a forward pass more; each micro-batch costs something by itself, so that large
    ones with it may go before small ones without; of a CPU as many work as fit.
    """
    fitting = (c for c in _candidates(request) if _fits(request, c))
    return min(fitting, key=lambda c: (_cost(request.tuning, c), -c.workers), default=None)


def smallest(request: Request) -> Choice:
    """The settings that need the least memory, whether they fit or not."""
    return min(_candidates(request), key=lambda choice: choice.prediction.total_bytes)


def _candidates(request: Request) -> Iterator[Choice]:
    scoring = {
        on: [
            peak.evaluation(request.model, _tuning(request, on), batch)
            for batch in peak.undominated(request.scored)
        ]
        for on in (False, True)
    }
    tokens, checkpointing = request.micro_batch_tokens, request.gradient_checkpointing
    for workers in range(1, request.workers + 1):
        for limit in _limits(request.tuning, workers) if tokens is None else (tokens,):
            batches = peak.undominated(request.workload.micro_batches(limit, workers))
            for on in (False, True) if checkpointing is None else (checkpointing,):
                training = peak.largest(request.model, _tuning(request, on), batches)
                all_that_can_be = [_side_by_side(training, workers), *scoring[on]]
                yield Choice(limit, on, max(all_that_can_be, key=lambda p: p.total_bytes), workers)


def _limits(tuning: Tuning, workers: int) -> list[int]:
    most = WORKER_TOKENS if workers > 1 else math.inf
    return [limit for limit in MICRO_BATCH_TOKENS[tuning.device] if limit <= most]


def _side_by_side(alone: Prediction, workers: int) -> Prediction:
    """At the worst each worker is at its peak at once; weights and the optimizer are there once."""
    each = (*TRANSIENT, "gradients")
    parts = {name: size * (workers if name in each else 1) for name, size in alone.parts.items()}
    more = sum(parts.values()) - alone.total_bytes
    return replace(alone, parts=parts, lowest_bytes=alone.lowest_bytes + more)


def _tuning(request: Request, checkpointing: bool) -> Tuning:
    return replace(request.tuning, gradient_checkpointing=checkpointing)


def _fits(request: Request, choice: Choice) -> bool:
    tuning = _tuning(request, choice.gradient_checkpointing)
    return fits(request.model, tuning, choice.prediction, request.total_bytes, choice.workers)


def _cost(tuning: Tuning, choice: Choice) -> float:
    """Time of a token, in passes over the weights: forward, backward, and forward again."""
    passes = 3 if choice.gradient_checkpointing else 2
    shared = 1.0 if choice.workers > 1 else ALONE
    fixed = FIXED_TOKENS[tuning.device] / choice.micro_batch_tokens
    return passes * shared * (1 + fixed)
