"""Output of the plan: tables for a terminal, and a chart of peaks with the cards that they fit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.plan.figures import BYTES_ALONE, CARDS_GIB, LENGTHS
from stages.shared.core import files
from stages.shared.parallel.placement import GIB

ON_DISK = ("base", "quantized", "adapter", "merged", "resume_state", "cache")
PARTS = {
    "weights": ("weights_bytes",),
    "adapter": ("adapter_bytes",),
    "gradients": ("gradients_bytes",),
    "optimizer states": ("optimizer_bytes",),
    "activations": ("activations_bytes",),
    "logits, workspace": ("logits_bytes", "workspace_bytes"),
}
IN_SIGHT = 0.05, 1.2  # cards between these shares of the longest bar get a line


def model(plan: Mapping[str, Any]) -> str:
    """Parameters as one line; of a mixture also those that a token uses, which take the time."""
    total, active = (plan["model"][name] / 1e9 for name in ("parameters", "active"))
    share = f", of them {active:,.2f} active for a token" if active < total else ""
    return f"parameters, 10⁹: {total:,.2f}{share}"


def cards(plan: Mapping[str, Any]) -> str:
    """Table of cards: the execution plan of params.yaml, and the techniques that fit."""
    rows = {}
    for card, chosen in plan["configured_on"].items():
        bf16 = chosen["instead_of_bf16"]
        needs = f"; no bf16: set {bf16}" if bf16 else ""
        needs += "; bytes alone" if card in BYTES_ALONE else ""
        fitting = [name for name, way in plan["techniques"].items() if way["fits"][card]]
        standard = [name for name in fitting if name != "configured"]
        rows[card.replace("_", " ").replace("GiB", " GiB")] = {
            "params.yaml": choice(chosen) + needs,
            "techniques that fit": f"{standard[0]} and below" if standard else "none",
        }
    return f"what fits\n{indented(pd.DataFrame(rows).T)}"


def devices(plans: Mapping[str, Any]) -> str:
    """Table of several devices: memory of each, with all weights or with its part of them."""
    table = pd.DataFrame(plans).map(choice).T
    return f"params.yaml on several devices, memory of each\n{indented(table)}"


def techniques(plan: Mapping[str, Any]) -> str:
    """Table of techniques: smallest card, peak, and its parts."""
    ways = pd.DataFrame(plan["techniques"]).T
    unit, scale = unit_of(ways["peak_bytes"].max())
    sizes = {
        "peak": ways["peak_bytes"],
        "weights": ways["weights_bytes"] + ways["adapter_bytes"],
        "gradients": ways["gradients_bytes"],
        "optimizer": ways["optimizer_bytes"],
        "activations": ways["activations_bytes"],
        "rest": ways["logits_bytes"] + ways["workspace_bytes"],
    }
    table = pd.DataFrame({"fits from": ways["fits"].map(smallest_card)})
    lines = [
        f"peak of a step with micro-batches of {plan['micro_batch']['tokens']:,} tokens, {unit}",
        indented(table.assign(**{n: (x / scale).map("{:,.2f}".format) for n, x in sizes.items()})),
        "weights: the adapter's too; rest: logits, and temporaries of the phase of the peak",
    ]
    bounds = [name for name, way in plan["techniques"].items() if way["upper_bound"]]
    if bounds:
        lines.append(f"upper bound, as outliers depend on values: {', '.join(bounds)}")
    lines += [f"left out: {name}: {reason}" for name, reason in plan["left_out"].items()]
    return "\n".join(lines)


def disk(plan: Mapping[str, Any]) -> str:
    """Bytes on disk, as one line."""
    sizes = ((name, plan["disk"][f"{name}_bytes"] / 1e9) for name in ON_DISK)
    return "disk, GB: " + ", ".join(f"{name.replace('_', ' ')} {size:,.2f}" for name, size in sizes)


def choice(chosen: Mapping[str, Any]) -> str:
    """The execution plan of a step, in words."""
    needed = f"{chosen['peak_bytes'] / GIB:.2f} GiB"
    if not chosen["fits"]:
        return f"does not fit: {needed} at the least"
    checkpointed = ", checkpointed" if chosen["gradient_checkpointing"] else ""
    return f"{needed}: micro-batches of {chosen['micro_batch_tokens']:,} tokens{checkpointed}"


def smallest_card(fits: Mapping[str, bool]) -> str:
    """Memory of the smallest card that holds a technique: `16 GiB`, or `none`."""
    fitting = [CARDS_GIB[card] for card in fits if fits[card]]
    return f"{min(fitting)} GiB" if fitting else "none"


def unit_of(largest: int) -> tuple[str, float]:
    """GB or MB, and its bytes."""
    return ("GB", 1e9) if largest >= 1e10 else ("MB", 1e6)


def indented(table: pd.DataFrame) -> str:
    """A table as text, two columns in."""
    return "  " + table.to_string(justify="right").replace("\n", "\n  ")


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
