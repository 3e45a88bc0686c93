"""The plan as a picture: a bar a technique, and below it how the peak grows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from stages.plan.growth import Growth
from stages.plan.techniques import CARDS_GIB
from stages.shared.core import files
from stages.shared.fitting import GIB

PARTS = {
    "weights": ("weights_bytes",),
    "adapter": ("adapter_bytes",),
    "gradients": ("gradients_bytes",),
    "optimizer states": ("optimizer_bytes",),
    "activations": ("activations_bytes",),
    "logits, workspace": ("logits_bytes", "workspace_bytes"),
}
IN_SIGHT = 0.05, 1.2  # cards from and up to these shares of the longest bar have a line
GRAY = "C5"


def draw(
    techniques: Mapping[str, Mapping[str, Any]],
    growth: Sequence[Growth],
    tokens: int,
    path: Path,
) -> None:
    """Write the picture as SVG.

    Args:
        techniques: as in the JSON.
        growth: the three panels below.
        tokens: of the micro-batch that the bars are for.
        path: of the file.
    """
    figure = Figure(figsize=(9.0, 4.4 + 0.36 * len(techniques)))
    rows = figure.subplot_mosaic(
        [["bars"] * 3, ["0", "1", "2"]],
        height_ratios=[1.2 + 0.36 * len(techniques), 2.6],
    )
    _bars(rows["bars"], techniques, tokens)
    for index, one in enumerate(growth):
        _lines(rows[str(index)], one)
    rows["0"].set_ylabel("peak, GB")
    handles, labels = rows["0"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    with files.whole_file(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})


def _bars(axes: Axes, techniques: Mapping[str, Mapping[str, Any]], tokens: int) -> None:
    longest = max(way["peak_bytes"] for way in techniques.values())
    unit, scale = ("GB", 1e9) if longest >= 1e10 else ("MB", 1e6)
    names = list(techniques)
    left = [0.0] * len(names)
    for index, (label, fields) in enumerate(PARTS.items()):
        widths = [sum(way[field] for field in fields) / scale for way in techniques.values()]
        axes.barh(names, widths, left=left, color=f"C{index}", label=label, height=0.62)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, (total, way) in enumerate(zip(left, techniques.values(), strict=True)):
        figure = f"{total:,.0f}" if total >= 100 else f"{total:.3g}"
        axes.annotate(
            figure if way["calibrated"] else f"≤ {figure}, uncalibrated",
            (total, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    lines = _cards_in_sight(longest)
    for gib, cards in lines.items():
        axes.axvline(gib * GIB / scale, color=GRAY, linewidth=1, linestyle="--")
        axes.annotate(
            f"{cards} {gib} GiB",
            (gib * GIB / scale, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-2, 2),
            textcoords="offset points",
            fontsize=7,
            rotation=30,
            va="bottom",
        )
    axes.set_axisbelow(True)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.12 * max(longest, *(g * GIB for g in lines), 0) / scale)
    note = "" if lines else f"\n(the smallest card, {_smallest_card()}, is out of sight)"
    axes.set_xlabel(f"peak of a step, {unit}, micro-batches of {tokens:,} tokens{note}")
    axes.legend(loc="lower right", frameon=False, fontsize=8)


def _lines(axes: Axes, growth: Growth) -> None:
    for index, (name, peaks) in enumerate(growth.peaks.items()):
        axes.plot(
            growth.values,
            [size / 1e9 for size in peaks],
            label=name,
            color=f"C{index % 2}",
            linestyle="-" if index < 2 else "--",
            marker="o",
            markersize=2.5,
            linewidth=1.3,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(growth.values[::2])))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: _tick(value, axes)))
    axes.tick_params(labelsize=7, which="both")
    axes.set_xlabel(growth.label, fontsize=8)


def _short(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def _tick(value: float, axes: Axes) -> str:
    """Label some of the steps between powers of ten where few powers are in sight."""
    low, high = axes.get_ylim()
    digit = round(value / 10 ** len(str(int(value))[1:])) if value >= 1 else 0
    return f"{value:g}" if high / low < 60 and digit in (2, 5) else ""


def _cards_in_sight(longest_bytes: int) -> dict[int, str]:
    """GiB → the cards that have so many, where a line would stand among the bars."""
    lower, upper = (share * longest_bytes for share in IN_SIGHT)
    lines: dict[int, list[str]] = {}
    for card, gib in CARDS_GIB.items():
        if lower <= gib * GIB <= upper:
            lines.setdefault(gib, []).append(_model_of(card))
    return {gib: " / ".join(cards) for gib, cards in lines.items()}


def _model_of(card: str) -> str:
    return card.rpartition("_")[0].replace("_", " ")


def _smallest_card() -> str:
    card = min(CARDS_GIB, key=CARDS_GIB.__getitem__)
    return f"{_model_of(card)} with {CARDS_GIB[card]} GiB"
