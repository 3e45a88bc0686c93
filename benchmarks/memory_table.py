"""The memory benchmark for people: a table, a picture, and the page that holds both."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.pictures import COLORS, picture
from benchmarks.training_step import Measured, Setting
from stages.shared.core import files
from stages.shared.peak import Prediction

PAGE = Path("docs/memory.md")
PICTURE = Path("docs/pictures/memory.svg")
BETWEEN = re.compile(r"(<!-- measured -->\n).*?(<!-- end of measured -->)", re.DOTALL)


class Row(Protocol):
    """One setting: what was predicted, and what was measured."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def setting(self) -> Setting:
        """What was trained, and how."""

    @property
    def predicted(self) -> Prediction:
        """By the planner."""

    @property
    def measured(self) -> Measured:
        """Of a real step."""

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""


def table(rows: Sequence[Row]) -> str:
    """As Markdown, a line a setting, and a line of all errors."""
    lines = [
        "| model | trained | checkpointed | tokens | measured, MB | predicted, MB | error | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        setting = row.setting
        lines.append(
            f"| {row.model} | {trained(setting)} | "
            f"{'yes' if setting.gradient_checkpointing else 'no'} | {setting.tokens} | "
            f"{row.measured.peak_bytes / 1e6:,.1f} | {row.predicted.total_bytes / 1e6:,.1f} | "
            f"{row.error:+.1%} | {row.predicted.instant} |"
        )
    return "\n".join([*lines, "", summary(rows)])


def trained(setting: Setting) -> str:
    """What is trained, in words."""
    optimizer = ", 8-bit AdamW" if setting.optimizer == "adamw_8bit" else ""
    if setting.rank is None:
        return f"all weights, {setting.precision}{optimizer}"
    double = setting.precision in ("fp4", "nf4") and not setting.double_quant
    return f"rank {setting.rank} on {setting.precision}{' single' if double else ''}{optimizer}"


def summary(rows: Sequence[Row]) -> str:
    """One line: how far predictions are off."""
    errors = [row.error for row in rows]
    return (
        f"{len(rows)} settings: median error {statistics.median(map(abs, errors)):.2%}, "
        f"from {min(errors):+.2%} to {max(errors):+.2%}."
    )


def write(rows: Sequence[Row], text: str) -> None:
    """Put the table into the page, and draw the picture."""
    page = PAGE.read_text(encoding="utf-8")
    files.write_text(PAGE, BETWEEN.sub(lambda m: f"{m[1]}{text}\n{m[2]}", page))
    draw(rows, PICTURE)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Predicted against measured, and the error of each, a colour a model."""
    with picture(path, width=9.0, height=4.2) as figure:
        whole, errors = figure.subplots(1, 2)
        for color, name in zip(COLORS, dict.fromkeys(row.model for row in rows), strict=False):
            own = [row for row in rows if row.model == name]
            measured = [row.measured.peak_bytes / 1e6 for row in own]
            predicted = [row.predicted.total_bytes / 1e6 for row in own]
            whole.plot(measured, predicted, "o", color=color, label=name, markersize=4, alpha=0.7)
            off = [100 * row.error for row in own]
            errors.plot(measured, off, "o", color=color, label=name, markersize=4, alpha=0.7)
        ends = [min(r.measured.peak_bytes for r in rows), max(r.measured.peak_bytes for r in rows)]
        whole.plot([e / 1e6 for e in ends], [e / 1e6 for e in ends], color="#8a8f98", linewidth=1)
        for axes in (whole, errors):
            axes.set_xscale("log")
            axes.set_xlabel("measured peak, MB")
        whole.set_yscale("log")
        whole.set_ylabel("predicted peak, MB")
        errors.set_ylabel("error, %")
        errors.set_ylim(-9, 9)
        for promise, style in ((8, "--"), (-3, "--"), (0, "-")):
            errors.axhline(promise, color="#8a8f98", linewidth=1, linestyle=style)
        errors.annotate(
            "promised: never above 8 %, never below −3 %",
            (0.02, 8),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=7,
        )
        whole.legend(frameon=False, fontsize=8)
