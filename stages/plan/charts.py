"""Charts of the plan: a bar per technique with the cards it fits, and peak against tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.plan.figures import CARDS_GIB, LENGTHS
from stages.plan.tables import smallest_card, unit_of
from stages.shared.core import files
from stages.shared.parallel.placement import GIB

PARTS = {
    "weights": ("weights_bytes",),
    "adapter": ("adapter_bytes",),
    "gradients": ("gradients_bytes",),
    "optimizer states": ("optimizer_bytes",),
    "activations": ("activations_bytes",),
    "logits, workspace": ("logits_bytes", "workspace_bytes"),
}
IN_SIGHT = 0.05, 1.2  # cards between these shares of the longest bar get a line


def draw(plan: Mapping[str, Any], growth: Mapping[str, Sequence[int]], path: Path) -> None:
    """Write the charts as SVG; `growth` holds a technique's peak bytes at each of `LENGTHS`."""
    height = 1.2 + 0.36 * len(plan["techniques"])
    figure = Figure(figsize=(9.0, 3.2 + height))
    bars, lines = figure.subplots(2, 1, height_ratios=[height, 2.6])
    _draw_bars(bars, plan["techniques"], plan["micro_batch"]["tokens"])
    for index, (name, peaks) in enumerate(growth.items()):
        style = "-" if index < 2 else "--"
        gigabytes = [size / 1e9 for size in peaks]
        lines.plot(LENGTHS, gigabytes, style, color=f"C{index % 2}", marker="o", label=name)
    lines.set_xscale("log", base=2)
    lines.set_yscale("log")
    lines.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
    lines.set_xlabel("tokens of one conversation")
    lines.set_ylabel("peak, GB")
    lines.legend(frameon=False, fontsize=8)
    with files.whole_file(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})


def _draw_bars(axes: Axes, techniques: Mapping[str, Mapping[str, Any]], tokens: int) -> None:
    """Bars by ascending peak, each with the smallest card that holds it."""
    ways = dict(sorted(techniques.items(), key=lambda item: item[1]["peak_bytes"]))
    longest = max(way["peak_bytes"] for way in ways.values())
    unit, scale = unit_of(longest)
    left = [0.0] * len(ways)
    for label, fields in PARTS.items():
        widths = [sum(way[field] for field in fields) / scale for way in ways.values()]
        axes.barh(list(ways), widths, left=left, label=label, height=0.62)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, (total, way) in enumerate(zip(left, ways.values(), strict=True)):
        figure = f"{total:,.0f}" if total >= 100 else f"{total:.3g}"
        bound = "≤ " if way["upper_bound"] else ""
        card = smallest_card(way["fits"])
        fits = "fits no card" if card == "none" else f"fits {card}"
        axes.annotate(f"  {bound}{figure}, {fits}", (total, row), va="center", fontsize=8)
    sizes = [gib * GIB for gib in sorted(set(CARDS_GIB.values()))]
    shown = [size for size in sizes if IN_SIGHT[0] * longest <= size <= IN_SIGHT[1] * longest]
    for size in shown:
        axes.axvline(size / scale, color="C5", linewidth=1, linestyle="--")
        label, position = f"{size // GIB} GiB", (size / scale, 1)
        axes.annotate(label, position, xycoords=("data", "axes fraction"), fontsize=7, rotation=30)
    axes.set_axisbelow(True)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.3 * longest / scale)
    note = "" if shown else f" (the smallest card, {min(sizes) // GIB} GiB, is out of sight)"
    axes.set_xlabel(f"peak of a step, {unit}, micro-batches of {tokens:,} tokens{note}")
    axes.legend(loc="lower right", frameon=False, fontsize=8)
