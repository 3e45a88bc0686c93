"""Pictures that are the same bytes for the same numbers, so that DVC and git see no change."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure

from stages.shared.core import files

COLORS = ("#4269d0", "#ef8c3b", "#3ca951", "#97519e", "#9c6b4e", "#8a8f98")


@contextmanager
def picture(path: Path, *, width: float = 8.0, height: float = 4.5) -> Iterator[Figure]:
    """A figure (inches) that is written to `path` as SVG when the block ends without an error."""
    style: dict[Any, Any] = {
        "svg.hashsalt": "dvc-qlora",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with files.whole_file(path) as partial:
            figure.savefig(partial, format="svg", metadata={"Date": None})
