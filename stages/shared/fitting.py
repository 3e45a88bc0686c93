"""Which settings of the machine fit its memory, the fastest of them, and what to change if none.

Pure functions of the model, the parameters, the data and the machine's total memory: never of free
memory or of a timing, so that the same machine always computes in the same way.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from stages.shared import peak
from stages.shared.adapter import Adapter
from stages.shared.peak import Prediction
from stages.shared.tensors import Model
from stages.shared.tuning import Tuning
from stages.shared.workload import Workload
from stages.shared.workspace import MicroBatch

GIB = 2**30
# Larger micro-batches gain nothing more. On a CPU: 300 tokens/s at 1,024 and 295 at 2,048.
MICRO_BATCH_TOKENS = {"cuda": (8192, 4096, 2048, 1024, 512, 256), "cpu": (1024, 512, 256, 128)}
# Tokens whose products take as long as dequantizing the weights for them once does, which a
# micro-batch pays however short it is: 2·P operations a token against 2.5·P bytes read and written.
# From an A100's 312 Tflop/s (half of them reached) and 1.5 TB/s; it only orders candidates.
DEQUANTIZATION_TOKENS = {"cuda": 130, "cpu": 20}
# Held beside live tensors. Of CUDA an assumption, a context with its kernels, until a GPU has
# measured it (benchmarks/memory_cuda.py); of a CPU the interpreter, its libraries and the products
# that they compile, measured: see docs/memory.md.
RESERVED_BYTES = {"cuda": 768 * 2**20, "cpu": 3 * GIB // 2}
# Of a CPU's tensors that come and go: freed pages that the C library's heap keeps between others.
HEAP_SHARE = 0.25
TRANSIENT = ("activations", "logits", "workspace")
ALLOCATION_ROUNDING = 512  # CUDA's allocator hands out multiples of it
SEGMENT_BYTES = 20 * 2**20  # and holds one such segment that is not full, at the least


@dataclass(frozen=True)
class Choice:
    """How a step is computed, and the memory that it takes."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    prediction: Prediction


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
    """

    model: Model
    tuning: Tuning
    workload: Workload
    total_bytes: int
    micro_batch_tokens: int | None = None
    gradient_checkpointing: bool | None = None
    instead_of_full: Adapter | None = None
    scored: frozenset[MicroBatch] = frozenset()


def device_bytes(model: Model, tuning: Tuning, prediction: Prediction) -> int:
    """What a device must have: live tensors, the allocator's rounding, and what else runs there.

    On CUDA half of 512 bytes is lost with each tensor on average, and a part of a segment. On a CPU
    it is an allowance for the whole process: the most that was seen, rounded up.

    Source: torch 2.13, c10/cuda/CUDACachingAllocator.cpp, `kMinBlockSize`, `kLargeBuffer`.
    """
    reserved = RESERVED_BYTES[tuning.device]
    if tuning.device == "cuda":
        tensors = len(model.tensors) + 4 * len(tuning.trained_sizes(model))
        reserved += SEGMENT_BYTES + tensors * ALLOCATION_ROUNDING // 2
    else:
        reserved += int(HEAP_SHARE * sum(prediction.parts[name] for name in TRANSIENT))
    return prediction.total_bytes + reserved


def fits(model: Model, tuning: Tuning, prediction: Prediction, total_bytes: int) -> bool:
    """Whether a device with so much memory can do it."""
    return device_bytes(model, tuning, prediction) <= total_bytes


def choose(request: Request) -> Choice | None:
    """The fastest of the settings that fit; None if none does.

    Checkpointing is a forward pass more, so that it is off where it can be; a micro-batch is as
    large as fits, since each dequantizes the weights anew.
    """
    fitting = (c for c in _candidates(request) if _fits(request, c))
    return min(fitting, key=lambda choice: _cost(request.tuning, choice), default=None)


def smallest(request: Request) -> Choice:
    """The settings that need the least memory, whether they fit or not."""
    return min(_candidates(request), key=lambda choice: choice.prediction.total_bytes)


def _candidates(request: Request) -> Iterator[Choice]:
    tokens, checkpointing = request.micro_batch_tokens, request.gradient_checkpointing
    for limit in MICRO_BATCH_TOKENS[request.tuning.device] if tokens is None else (tokens,):
        batches = peak.undominated(request.workload.micro_batches(limit))
        for on in (False, True) if checkpointing is None else (checkpointing,):
            tuning = replace(request.tuning, gradient_checkpointing=on)
            training = peak.largest(request.model, tuning, batches)
            scoring = (
                peak.evaluation(request.model, tuning, batch)
                for batch in peak.undominated(request.scored)
            )
            yield Choice(limit, on, max([training, *scoring], key=lambda p: p.total_bytes))


def _fits(request: Request, choice: Choice) -> bool:
    tuning = replace(request.tuning, gradient_checkpointing=choice.gradient_checkpointing)
    return fits(request.model, tuning, choice.prediction, request.total_bytes)


def _cost(tuning: Tuning, choice: Choice) -> float:
    """Time of a token, in passes over the weights: forward, backward, and forward again."""
    passes = 3 if choice.gradient_checkpointing else 2
    return passes * (1 + DEQUANTIZATION_TOKENS[tuning.device] / choice.micro_batch_tokens)
