"""The plan as a picture: a bar a technique, a colour a part, a line a card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.plan.techniques import CARDS_GIB, GIB
from stages.shared.pictures import COLORS, picture

PARTS = {
    "weights": "weights_bytes",
    "adapter": "adapter_bytes",
    "gradients": "gradients_bytes",
    "optimizer states": "optimizer_bytes",
}
IN_SIGHT = 0.05, 1.2  # cards from and up to these shares of the longest bar have a line


def draw(techniques: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write stacked horizontal bars to `path` as SVG, from `techniques` as in the JSON."""
    longest = max(t["persistent_bytes"] for t in techniques.values())
    unit, scale = ("GB", 1e9) if longest >= 1e10 else ("MB", 1e6)
    names = list(techniques)
    with picture(path, width=8.0, height=1.2 + 0.36 * len(names)) as figure:
        axes = figure.subplots()
        left = [0.0] * len(names)
        for color, (label, field) in zip(COLORS, PARTS.items(), strict=False):
            widths = [t[field] / scale for t in techniques.values()]
            axes.barh(names, widths, left=left, color=color, label=label, height=0.62)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for row, total in enumerate(left):
            axes.annotate(
                f"{total:,.0f}" if total >= 100 else f"{total:.2g}",
                (total, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        lines = _cards_in_sight(longest)
        for gib, cards in lines.items():
            axes.axvline(gib * GIB / scale, color="#8a8f98", linewidth=1, linestyle="--")
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
        axes.set_xlabel(f"persistent memory, {unit}; activations come on top{note}")
        axes.legend(loc="lower right", frameon=False, fontsize=8)


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
