"""What the benchmark of training steps on a GPU found, as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from stages.shared.fitting import GIB

RESULTS = Path("benchmarks/results/training_cuda.json")


@dataclass(frozen=True)
class Way:
    """Who computes a step, and how; None leaves the choice to the plan.

    Attributes:
        who: ours, trl or unsloth.
        micro_batch: conversations in a micro-batch.
        gradient_checkpointing: whether activations are computed again.
        cap_gib: all of the GPU that torch may have.
    """

    who: str
    micro_batch: int | None
    gradient_checkpointing: bool | None
    cap_gib: int | None = None


@dataclass(frozen=True)
class Result:
    """What came of a way.

    Attributes:
        model: its name.
        way: who computed, and how.
        resolved: by the plan, where it chose.
        operations_per_token: of a step without checkpointing.
        steps: what the worker answered, after those that warm up; none where memory was short.
        failure: what a peer ended with, if it was not for memory.
    """

    model: str
    way: Way
    resolved: Mapping[str, Any]
    operations_per_token: float
    steps: Sequence[Mapping[str, float]]
    failure: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """The median over the steps."""
        return median(step["tokens"] / step["seconds"] for step in self.steps)

    @property
    def checkpointed(self) -> bool:
        """Whether activations were computed again; of what had no room, whether they were to be."""
        return bool(self.resolved.get("gradient_checkpointing", self.way.gradient_checkpointing))

    @property
    def peak_bytes(self) -> float:
        """The most that torch held in any of the steps."""
        return max(step["peak_bytes"] for step in self.steps)

    @property
    def share(self) -> float:
        """Of the matrix rate measured just before each step; what is computed twice counts once."""
        return median(
            step["tokens"] * self.operations_per_token / step["seconds"] / step["matrix_rate"]
            for step in self.steps
        )


def table(results: Sequence[Result]) -> str:
    """As Markdown: a line a way."""
    lines = [
        "| model | who | conversations at once | checkpointed | tokens/s | Tflop/s "
        "| of the matrix rate | peak, GiB |",
        "|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for one in results:
        way = one.way
        at_once = way.micro_batch or (
            f"{one.resolved['micro_batch_tokens']:,} tokens" if one.resolved else "as planned"
        )
        capped = f" within {way.cap_gib} GiB" if way.cap_gib else ""
        figures = f"{'failed' if one.failure else 'no room'} | | |"
        if one.steps:
            rate = one.tokens_per_second * one.operations_per_token / 1e12
            peak = one.peak_bytes / GIB
            figures = f"{one.tokens_per_second:,.0f} | {rate:.0f} | {one.share:.0%} | {peak:.2f}"
        lines.append(
            f"| {one.model}{capped} | {way.who} | {at_once} "
            f"| {'yes' if one.checkpointed else 'no'} | {figures} |"
        )
    return "\n".join(lines)


def results_of(found: Mapping[str, Any]) -> list[Result]:
    """What was written as JSON."""
    return [Result(**one | {"way": Way(**one["way"])}) for one in found["results"]]


def text(found: Mapping[str, Any]) -> str:
    """The table, and where it was measured."""
    where = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['device']}; {versions}.\n\n{table(results_of(found))}"
