"""How cost grows, for people: a table with fitted exponents, and a picture.

Reads:  benchmarks/results/growth.json
Writes: the table in docs/performance.md, docs/pictures/growth_cost.svg
Run:    python -m benchmarks.growth_table
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.page import PAGE, put
from benchmarks.pictures import COLORS, picture
from stages.shared.core import files

RESULTS = Path("benchmarks/results/growth.json")
PICTURE = Path("docs/pictures/growth_cost.svg")
SWEEPS = {"length": "tokens of the conversation", "rank": "rank", "parameters": "parameters"}
GB = 1e9


@dataclass(frozen=True)
class Point:
    """Steps of one length, rank and model; the first is a warm-up.

    Attributes:
        sweep: what grows.
        value: how much there is of it.
        before_bytes: resident before the first step.
        bound_operations: of the step's frozen matrix products.
        steps: what the worker answered.
    """

    sweep: str
    value: int
    before_bytes: int
    bound_operations: int
    steps: Sequence[Mapping[str, float]]

    @property
    def matrix_rate(self) -> float:
        """Operations a second that the probes found."""
        return median(step["matrix_rate"] for step in self.steps[1:])

    @property
    def tokens_per_operation(self) -> float:
        """Tokens in the time of an operation of a matrix product: the machine's speed left out."""
        return median(
            step["input_tokens"] / step["seconds"] / step["matrix_rate"] for step in self.steps[1:]
        )

    @property
    def share_of_bound(self) -> float:
        """The time of the step's products alone over all its time."""
        return self.tokens_per_operation * self.bound_operations / self.steps[0]["input_tokens"]

    @property
    def peak_bytes(self) -> int:
        """The most that was resident."""
        return int(max(step["peak_bytes"] for step in self.steps))

    @property
    def added_bytes(self) -> int:
        """Of the peak, what stands above the loaded model."""
        return self.peak_bytes - self.before_bytes

    @property
    def line(self) -> str:
        """For a terminal."""
        rate = self.tokens_per_operation * self.matrix_rate
        return (
            f"{self.sweep} {self.value:,}: {rate:,.0f} tokens/s at "
            f"{self.matrix_rate / GB:,.0f} GFLOP/s, {self.peak_bytes / GB:.2f} GB"
        )


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """The power of a value that a cost grows with, by least squares on both logarithms."""
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def read(found: Mapping[str, Any]) -> dict[str, list[Point]]:
    """The points of each sweep, as they were measured."""
    points = [Point(**one) for one in found["points"]]
    return {sweep: [p for p in points if p.sweep == sweep] for sweep in SWEEPS}


def rate_of(sweeps: Mapping[str, Sequence[Point]]) -> float:
    """The matrix rate that all points are scaled to: the median of what the probes found."""
    return median(point.matrix_rate for points in sweeps.values() for point in points)


def text(found: Mapping[str, Any]) -> str:
    """As Markdown: a line a point, and a line of exponents a sweep."""
    sweeps = read(found)
    rate, ran = rate_of(sweeps), found["environment"]
    lines = [
        f"{ran['device']}, {ran['threads']} threads; tokens a second at {rate / GB:,.0f} GFLOP/s.",
        "",
        "| what grows | | tokens/s | of the bound | peak, GB | above the loaded model, GB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for sweep, points in sweeps.items():
        lines += [
            f"| {SWEEPS[sweep]} | {_short(point.value)} | {point.tokens_per_operation * rate:,.0f} "
            f"| {point.share_of_bound:.0%} | {point.peak_bytes / GB:.2f} "
            f"| {point.added_bytes / GB:.2f} |"
            for point in points
        ]
        values = [point.value for point in points]
        slopes = [
            exponent(values, [cost(point) for point in points])
            for cost in (
                lambda point: point.tokens_per_operation,
                lambda point: point.peak_bytes,
                lambda point: point.added_bytes,
            )
        ]
        lines.append(
            f"| **grows with its power of** | | **{slopes[0]:+.2f}** | | **{slopes[1]:+.2f}** "
            f"| **{slopes[2]:+.2f}** |"
        )
    return "\n".join(lines)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Tokens a second above, memory below, a column for each that grows."""
    sweeps = read(found)
    rate = rate_of(sweeps)
    with picture(path, width=9.0, height=5.0) as figure:
        panels = figure.subplots(2, len(sweeps), sharey="row", sharex="col")
        for column, (sweep, points) in enumerate(sweeps.items()):
            values = [point.value for point in points]
            speed, memory = panels[0][column], panels[1][column]
            speeds = [point.tokens_per_operation * rate for point in points]
            speed.plot(values, speeds, "o-", color=COLORS[0], markersize=4)
            whole = [point.peak_bytes / GB for point in points]
            added = [point.added_bytes / GB for point in points]
            memory.plot(values, whole, "o-", color=COLORS[1], markersize=4, label="peak")
            memory.plot(
                values, added, "o--", color=COLORS[2], markersize=4, label="above the loaded model"
            )
            memory.set_xlabel(SWEEPS[sweep], fontsize=8)
            for axes in (speed, memory):
                _logarithmic(axes, values)
        panels[0][0].set_ylabel("tokens a second", fontsize=8)
        panels[1][0].set_ylabel("resident, GB", fontsize=8)
        panels[1][-1].legend(frameon=False, fontsize=7)


def _logarithmic(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:g}" if _is_round(value) else ""))
    axes.tick_params(labelsize=7, which="both")


def _is_round(value: float) -> bool:
    """Whether its first digit is 1, 2 or 5: labels of the others would run into each other."""
    return f"{value:e}"[0] in "125"


def _short(value: float) -> str:
    return f"{value / 1e9:.2g}e9" if value >= 1e8 else f"{value:,.0f}"


def write(found: Mapping[str, Any]) -> None:
    """Put the table into the page, and draw the picture."""
    put("growth", text(found))
    draw(found, PICTURE)


if __name__ == "__main__":
    write(files.read_json(RESULTS))
    print(PAGE)
