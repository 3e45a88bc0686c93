"""Charts of the page: training history, use of experts, and the SVG files of other stages."""

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
    return _svg(figure)


def expert_use(use: Mapping[str, Any]) -> str:
    """SVG of each expert's tokens, in even shares, by layer: before and after training."""
    shares = {when: np.array(values["shares"]) for when, values in use.items()}
    even = {when: share * share.shape[1] for when, share in shares.items()}
    layers, experts = next(iter(even.values())).shape
    largest = max(share.max() for share in even.values())
    figure = Figure(figsize=(9.0, 1.8 + min(5.0, 0.25 * layers)))
    panels = figure.subplots(1, len(even), squeeze=False, sharey=True)[0]
    for panel, (when, share) in zip(panels, even.items(), strict=True):
        ends = (0.5, experts + 0.5, layers + 0.5, 0.5)
        image = panel.imshow(share, "Blues", aspect="auto", vmin=0, vmax=largest, extent=ends)
        panel.set_title(f"{when} training", loc="left")
        panel.set_xlabel("expert")
        panel.grid(visible=False)
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("layer with experts")
    figure.colorbar(image, ax=list(panels), label="tokens, even share = 1")
    return _svg(figure)


def _svg(figure: Figure) -> str:
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
