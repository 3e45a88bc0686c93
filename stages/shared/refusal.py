"""What to say to a training that cannot fit: its parts, and the smallest changes that help."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import get_args

from stages.shared import fitting
from stages.shared.fitting import GIB, MICRO_BATCH_TOKENS, Request
from stages.shared.memory import Precision

SHOWN = 3
SMALLEST_RANK = 4


@dataclass(frozen=True)
class Change:
    """A change in words, and what is asked for after it."""

    words: str
    request: Request


def refusal(request: Request) -> str:
    """One line for a training that `fitting.choose` finds no settings for.

    It names what is needed, by part, and up to three changes, each of which makes it fit: first
    those that change no result, then those that change it least.
    """
    least = fitting.smallest(request)
    prediction = least.prediction
    tuning = replace(request.tuning, gradient_checkpointing=least.gradient_checkpointing)
    needed = fitting.device_bytes(request.model, tuning, prediction)
    parts = prediction.parts | {"beside tensors": needed - prediction.total_bytes}
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    remedies = "; or ".join(change.words for change in changes(request))
    advice = f"to make it fit: {remedies}" if remedies else "take a smaller model or another device"
    bound = "" if prediction.calibrated else f"{prediction.lowest_bytes / GIB:.2f} to "
    kind = "" if prediction.calibrated else ", uncalibrated"
    return (
        f"training needs {bound}{needed / GIB:.2f} GiB{kind} ({listed}) even with micro-batches of "
        f"{least.micro_batch_tokens} tokens and gradient checkpointing "
        f"{'on' if least.gradient_checkpointing else 'off'}; expected at most "
        f"{request.total_bytes / GIB:.2f} GiB; {advice}"
    )


def changes(request: Request) -> list[Change]:
    """The smallest changes that make it fit: single ones, then two and three together."""
    found: dict[frozenset[Kind], Change] = {}
    for size in (1, 2, 3):
        for kinds in combinations(_KINDS, size):
            if len(found) == SHOWN:
                return list(found.values())
            if any(fewer.issubset(kinds) for fewer in found):
                continue
            if change := _together(request, kinds):
                found[frozenset(kinds)] = change
    return list(found.values())


def _together(request: Request, kinds: tuple["Kind", ...]) -> Change | None:
    """The greatest change of each kind but the last, and of the last the smallest that fits."""
    words = []
    for kind in kinds[:-1]:
        greatest = list(kind(request))[-1:]
        if not greatest:
            return None
        words.append(greatest[0].words)
        request = greatest[0].request
    for change in kinds[-1](request):
        if fitting.choose(change.request):
            return Change(" and ".join([*words, change.words]), change.request)
    return None


def _micro_batch(request: Request) -> Iterator[Change]:
    asked = request.micro_batch_tokens or 0
    for tokens in MICRO_BATCH_TOKENS[request.tuning.device]:
        if tokens < asked:
            words = f"QLORA_MICRO_BATCH_TOKENS {asked} → {tokens}"
            yield Change(words, replace(request, micro_batch_tokens=tokens))


def _checkpointing(request: Request) -> Iterator[Change]:
    if request.gradient_checkpointing is False:
        words = "gradient checkpointing on (QLORA_GRADIENT_CHECKPOINTING=true)"
        yield Change(words, replace(request, gradient_checkpointing=True))


def _double_quant(request: Request) -> Iterator[Change]:
    if request.tuning.precision in ("fp4", "nf4") and not request.tuning.double_quant:
        yield _tuned(request, "quantize.double_quant true", double_quant=True)


def _optimizer(request: Request) -> Iterator[Change]:
    if request.tuning.optimizer == "adamw":
        yield _tuned(request, "train.optimizer adamw_8bit", optimizer="adamw_8bit")


def _rank(request: Request) -> Iterator[Change]:
    adapter = request.tuning.adapter
    rank = adapter.rank if adapter else 0
    while adapter and (rank := rank // 2) >= SMALLEST_RANK:
        words = f"lora.r {adapter.rank} → {rank}"
        yield _tuned(request, words, adapter=adapter.at_rank(rank))


def _max_length(request: Request) -> Iterator[Change]:
    longest = request.workload.longest
    for length in (2**power for power in range(14, 6, -1)):
        if length < longest:
            words = f"prepare.max_length {length} (the longest conversation has {longest} tokens)"
            yield Change(words, replace(request, workload=request.workload.cut(length)))


def _precision(request: Request) -> Iterator[Change]:
    order = ("fp32", "bf16", "int8", "nf4")
    like = {"fp16": "bf16", "fp4": "nf4"}.get(request.tuning.precision, request.tuning.precision)
    lower = order[order.index(like) + 1 :] if request.tuning.adapter else ()
    for precision in get_args(Precision):
        if precision in lower:
            yield _tuned(
                request,
                f"quantize.precision {precision}",
                precision=precision,
                double_quant=precision == "nf4",
            )


def _method(request: Request) -> Iterator[Change]:
    if request.tuning.adapter is None and request.instead_of_full:
        yield _tuned(request, "train.method lora", adapter=request.instead_of_full)


def _tuned(request: Request, words: str, **changed: object) -> Change:
    return Change(words, replace(request, tuning=replace(request.tuning, **changed)))  # type: ignore[arg-type]


Kind = Callable[[Request], Iterator[Change]]
# The least harmful first: the first two change no result.
_KINDS: tuple[Kind, ...] = (
    _micro_batch,
    _checkpointing,
    _double_quant,
    _optimizer,
    _rank,
    _max_length,
    _precision,
    _method,
)
