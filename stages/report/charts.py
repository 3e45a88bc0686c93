"""Pictures for the page: the loss curve, drawn here, and those that other stages drew."""

import io
import re
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.figure import Figure

from stages.shared.core.errors import UserError

ACTIVE = re.compile(r"<script|<foreignobject|<iframe|\son\w+\s*=|javascript:", re.IGNORECASE)


def loss_curve(curve: Sequence[dict[str, float | None]], best_step: int | None) -> str:
    """Training and held-out loss against the optimizer step, the best step marked, as SVG.

    Args:
        curve: the rows of loss.csv; a cell that is None was not measured.
        best_step: whose weights were kept.
    """
    figure = Figure(figsize=(8.0, 3.6))
    axes = figure.subplots()
    axes.plot(*_series(curve, "loss"), linewidth=1.2, label="training, each step")
    axes.plot(
        *_series(curve, "eval_loss"), linewidth=1.8, marker="o", markersize=5, label="held-out"
    )
    if best_step is not None:
        kept = f"kept: step {best_step}"
        axes.axvline(best_step, color="C5", linewidth=1, linestyle="--", label=kept)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a supervised token")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def _series(
    curve: Sequence[dict[str, float | None]], column: str
) -> tuple[list[float], list[float]]:
    points = [(row.get("step"), row.get(column)) for row in curve]
    known = [(x, y) for x, y in points if x is not None and y is not None]
    return [x for x, _ in known], [y for _, y in known]


def inline(svg: str, prefix: str, label: str) -> Markup:
    """One of our own SVG files as an element of the page.

    Its ids get a prefix, since those of two figures are alike; its size is left to the page.

    Args:
        svg: the file's text.
        prefix: of its ids, unique on the page.
        label: what a screen reader says.

    Raises:
        UserError: it is no SVG, or holds what could run or load something.
    """
    start, end = svg.find("<svg"), svg.rfind("</svg>")
    if start < 0 or end < 0 or ACTIVE.search(svg):
        raise UserError(
            f"reports/{prefix}.svg: not a plain picture; expected the SVG that `{prefix}` writes; "
            f"run `dvc repro -f {prefix}`"
        )
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[start : end + len("</svg>")], flags=re.S)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", body)
    head, _, rest = body.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    opening = Markup('{} role="img" aria-label="{}">').format(Markup(head), label)  # noqa: S704
    return opening + Markup(rest)  # noqa: S704  (checked above, and drawn by ourselves)
