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
    losses, rates, norms = figure.subplots(3, 1, sharex=True, height_ratios=[2.6, 1, 1])
    held_out = _points(history, "eval_loss")
    losses.plot(_points(history, "loss"), linewidth=1.2, label="training, each step")
    line = ":" if len(held_out) > 2 else "none"  # two points are no course
    losses.plot(held_out, linestyle=line, marker="o", markersize=5, label="held-out")
    losses.set(ylabel="loss, nats a token")
    rates.plot(_points(history, "learning_rate"), linewidth=1.2, color="C2")
    rates.set(ylabel="learning rate")
    norms.plot(_points(history, "gradient_norm"), linewidth=1.0, color="C3")
    norms.set(ylabel="gradient norm", xlabel="optimizer step")
    figure.align_ylabels()
    for panel in (losses, rates, norms) if best_step is not None else ():
        kept = f"kept: step {best_step}"
        panel.axvline(best_step, color="C5", linewidth=1, linestyle="--", label=kept)
    losses.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    return _svg(figure)


def expert_use(use: Mapping[str, Any]) -> str:
    """SVG of each expert's tokens, in even shares, by layer: before and after training."""
    shares = {when: np.array(values["shares"]) for when, values in use.items()}
    layers, experts = next(iter(shares.values())).shape
    largest = experts * max(share.max() for share in shares.values())
    figure = Figure(figsize=(9.0, 1.8 + min(5.0, 0.25 * layers)))
    panels = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for panel, (when, share) in zip(panels, shares.items(), strict=True):
        style = {"extent": (0.5, experts + 0.5, layers + 0.5, 0.5), "vmin": 0, "vmax": largest}
        image = panel.imshow(share * experts, "Blues", aspect="auto", **style)
        panel.set_title(f"{when} training", loc="left")
        panel.set(xlabel="expert")
        panel.grid(visible=False)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set(ylabel="layer with experts")
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
    body = re.sub(r"<metadata>.*?</metadata>", "", visible(svg[start:end]) + "</svg>", flags=re.S)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", body)
    head, _, rest = body.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    opening = Markup('{} role="img" aria-label="{}">').format(Markup(head), label)  # noqa: S704
    return opening + Markup(rest)  # noqa: S704  (checked above)
