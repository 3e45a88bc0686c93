"""Charts of the page: the training history, and the SVG files of other stages."""

import io
import re

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from stages.shared.core.display import visible
from stages.shared.core.errors import UserError

ACTIVE = re.compile(r"<script|<foreignobject|<iframe|\son\w+\s*=|javascript:", re.IGNORECASE)


def training_history(history: pd.DataFrame, best_step: int | None) -> str:
    """SVG of loss, learning rate and gradient norm by optimizer step, with the best step marked."""
    figure = Figure(figsize=(8.0, 6.2))
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[2.6, 1, 1])
    training, held_out = _points(history, "loss"), _points(history, "eval_loss")
    axes[0].plot(training, linewidth=1.2, label="training, each step")
    line = ":" if len(held_out) > 2 else "none"  # two points are no course
    axes[0].plot(held_out, linestyle=line, marker="o", markersize=5, label="held-out")
    axes[0].set_ylabel("loss, nats a token")
    axes[1].plot(_points(history, "learning_rate"), linewidth=1.2, color="C2")
    axes[1].set_ylabel("learning rate")
    axes[2].plot(_points(history, "gradient_norm"), linewidth=1.0, color="C3")
    axes[2].set_ylabel("gradient norm")
    axes[2].set_xlabel("optimizer step")
    figure.align_ylabels(axes)
    if best_step is not None:
        kept = f"kept: step {best_step}"
        for panel in axes:
            panel.axvline(best_step, color="C5", linewidth=1, linestyle="--", label=kept)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def _points(history: pd.DataFrame, column: str) -> pd.Series:
    """A column by step, without unmeasured steps."""
    if not {"step", column} <= set(history.columns):
        return pd.Series(dtype=float)
    return history.set_index("step")[column].dropna()


def inline(svg: str, name: str, label: str) -> Markup:
    """SVG of the stage `name` as an element of the page, sized by CSS; active content is refused.

    Its ids get the prefix `name`: matplotlib gives two charts the same ids.
    """
    start, end = svg.find("<svg"), svg.rfind("</svg>")
    if start < 0 or end < 0 or ACTIVE.search(svg):
        raise UserError(f"reports/{name}.svg: not a plain chart. Run `dvc repro -f {name}`.")
    body = visible(svg[start : end + len("</svg>")])
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\1{name}-", body)
    head, _, rest = body.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    opening = Markup('{} role="img" aria-label="{}">').format(Markup(head), label)  # noqa: S704
    return opening + Markup(rest)  # noqa: S704  (checked above)
