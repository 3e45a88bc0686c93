"""The training benchmark as a picture."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.pictures import COLORS, picture
from benchmarks.training_figures import Comparison, Spread

GB = 1e9
GRAY = "#8a8f98"


def draw(compared: Sequence[Comparison], path: Path) -> None:
    """Tokens a second, share of the bound and peak of both, a pair of bars a comparison."""
    names = [f"{one.data}, {one.allocator}\ntrl {one.mode}" for one in compared]
    places = range(len(compared))
    with picture(path, width=9.0, height=1.6 + 0.55 * len(compared)) as figure:
        rates, shares, peaks = figure.subplots(1, 3, sharey=True)
        for offset, color, whose in ((-0.19, COLORS[0], "ours"), (0.19, COLORS[1], "peer")):
            label = "ours" if whose == "ours" else "trl"
            at = [place + offset for place in places]
            spreads = {
                rates: [one.tokens_per_second(whose) for one in compared],
                shares: [
                    Spread(*(100 * part for part in one.share_of_bound(whose))) for one in compared
                ],
            }
            for axes, found in spreads.items():
                axes.barh(
                    at,
                    [s.median for s in found],
                    height=0.36,
                    color=color,
                    label=label,
                    xerr=[[s.median - s.low for s in found], [s.high - s.median for s in found]],
                    error_kw={"ecolor": GRAY, "elinewidth": 1},
                )
            heights = [one.peak_bytes(whose) / GB for one in compared]
            peaks.barh(at, heights, height=0.36, color=color, label=label)
        for place, one in zip(places, compared, strict=True):
            rates.annotate(
                f"{one.ratio.median:.1f}×",
                (one.tokens_per_second("ours").high, place - 0.19),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        rates.set_yticks(list(places), names, fontsize=7)
        rates.invert_yaxis()
        for axes, label in (
            (rates, "tokens a second"),
            (shares, "of the matrix-product bound, %"),
            (peaks, "resident peak, GB"),
        ):
            axes.set_xlabel(label, fontsize=8)
            axes.tick_params(axis="x", labelsize=7)
            axes.grid(visible=False, axis="y")
            axes.set_axisbelow(True)
        rates.margins(x=0.2)
        peaks.legend(frameon=False, fontsize=8)
