"""The benchmark of training steps on a GPU as a picture."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.pictures import COLORS, picture
from benchmarks.training_cuda_table import Result
from stages.shared.fitting import GIB

PICTURE = Path("docs/pictures/performance_cuda.svg")
WHO = ("ours", "trl", "unsloth")


def draw(results: Sequence[Result], path: Path = PICTURE) -> None:
    """Tokens a second and peak of each way that took steps, a bar each."""
    shown = [one for one in results if one.steps]
    places = range(len(shown))
    colors = [COLORS[WHO.index(one.way.who)] for one in shown]
    with picture(path, width=9.0, height=1.2 + 0.34 * len(shown)) as figure:
        rates, peaks = figure.subplots(1, 2, sharey=True)
        for axes, values, label, shape in (
            (rates, [one.tokens_per_second for one in shown], "tokens a second", "{:,.0f}"),
            (peaks, [one.peak_bytes / GIB for one in shown], "peak, GiB", "{:.1f}"),
        ):
            bars = axes.barh(places, values, color=colors, height=0.66)
            axes.bar_label(bars, [shape.format(value) for value in values], padding=3, fontsize=7)
            axes.set_xlabel(label, fontsize=8)
            axes.tick_params(axis="x", labelsize=7)
            axes.grid(visible=False, axis="y")
            axes.set_axisbelow(True)
            axes.margins(x=0.18)
        rates.set_yticks(places, [named(one) for one in shown], fontsize=7)
        rates.invert_yaxis()


def named(result: Result) -> str:
    """A bar's name."""
    within = f" in {result.way.cap_gib} GiB" if result.way.cap_gib else ""
    again = ", checkpointed" if result.checkpointed else ""
    return f"{result.model}{within}\n{result.way.who}{again}"
