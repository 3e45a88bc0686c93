"""The training benchmark for people: tables, a picture, and the page that holds both.

Reads:  benchmarks/results/training.json
Writes: the tables in docs/performance.md, docs/pictures/performance.svg
Run:    python -m benchmarks.training_table
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.page import PAGE, put
from benchmarks.training_figures import Comparison, Spread, Tried, better_mode
from stages.shared import files
from stages.shared.pictures import COLORS, picture

RESULTS = Path("benchmarks/results/training.json")
PICTURE = Path("docs/pictures/performance.svg")
GB = 1e9
GRAY = "#8a8f98"


def read(found: Mapping[str, Any]) -> tuple[list[Tried], list[Comparison]]:
    """What the benchmark wrote, as it was measured."""
    tried = [Tried(**one) for one in found["tried"]]
    return tried, [Comparison(**one) for one in found["compared"]]


def text(found: Mapping[str, Any]) -> str:
    """As Markdown: where it ran, each comparison, the goals, the peer's micro-batches."""
    tried, compared = read(found)
    return "\n\n".join(
        [where(found, compared), table(compared), goals(compared), tried_table(tried)]
    )


def where(found: Mapping[str, Any], compared: Sequence[Comparison]) -> str:
    """A line on the machine and the versions."""
    ran = found["environment"]
    versions = ran["versions"]
    names = ("torch", "transformers", "peft", "bitsandbytes")
    rates = [one.matrix_rate for one in compared]
    return (
        f"{ran['device']}, {ran['threads']} threads; "
        + ", ".join(f"{name} {versions[name]}" for name in names)
        + f", trl {found['trl']}. The probes found {min(r.low for r in rates) / GB:,.0f} to "
        f"{max(r.high for r in rates) / GB:,.0f} GFLOP/s (quartiles). Ours: "
        + ", ".join(dict.fromkeys(computed(one.resolved) for one in compared))
        + "."
    )


def computed(resolved: Mapping[str, Any]) -> str:
    """How ours computed a step, in words."""
    because = resolved["unfused_because"]
    return (
        f"micro-batches of {resolved['micro_batch_tokens']:,} tokens, "
        f"{'' if resolved['gradient_checkpointing'] else 'not '}checkpointed, "
        f"{'fused' if because is None else f'not fused ({because})'}"
    )


def table(compared: Sequence[Comparison]) -> str:
    """A line a comparison; medians, with quartiles where there is room."""
    lines = [
        "| conversations | allocator | trl | tokens/s, ours | trl | ratio (quartiles) "
        "| at one matrix rate | of the bound, ours | trl | peak GB, ours | trl | ratio | rounds |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in compared:
        ours, peer = one.tokens_per_second("ours"), one.tokens_per_second("peer")
        lines.append(
            f"| {one.data} | {one.allocator} | {mode(one)} | {ours.median:,.0f} "
            f"| {peer.median:,.0f} | **{one.ratio.median:.2f}** ({between(one.ratio)}) "
            f"| {one.ratio_at_one_rate.median:.2f} | {one.share_of_bound('ours').median:.0%} "
            f"| {one.share_of_bound('peer').median:.0%} | {memory(one, 'ours')} "
            f"| {memory(one, 'peer')} | {one.memory_ratio:.2f} | {len(one.measured)} |"
        )
    return "\n".join(lines)


def mode(one: Comparison) -> str:
    """How the peer laid out a step, in words."""
    if one.micro_batch is None:
        return f"packed to {one.pack_tokens}"
    return f"unpacked, {one.micro_batch} at once ({one.padding:.0%} padding)"


def between(found: Spread) -> str:
    """The quartiles."""
    return f"{found.low:.2f}–{found.high:.2f}"


def memory(one: Comparison, whose: str) -> str:
    """The peak, and what stood before the first step."""
    return f"{one.peak_bytes(whose) / GB:.2f} ({one.before_bytes[whose] / GB:.2f} before)"


def goals(compared: Sequence[Comparison]) -> str:
    """A line for each set of conversations and allocator: ours beside the peer's better mode."""
    lines = []
    for data, allocator in dict.fromkeys((one.data, one.allocator) for one in compared):
        one = better_mode(compared, data, allocator)
        share = one.share_of_bound("ours").median
        lines.append(
            f"- {data}, {allocator} allocator: {one.ratio.median:.2f} times the tokens a second of "
            f"trl's better mode ({one.mode}), {one.memory_ratio:.2f} times its memory, {share:.0%} "
            "of the matrix-product bound"
        )
    return "\n".join(lines)


def tried_table(tried: Sequence[Tried]) -> str:
    """What the peer's size of a micro-batch does to it, unpacked, on one step."""
    lines = [
        "| trl, unpacked | conversations at once | tokens/s | GFLOP/s just before | peak GB |",
        "|---|--:|--:|--:|--:|",
    ]
    for one in tried:
        step = one.step
        lines.append(
            f"| {one.data} | {one.micro_batch} | {step['tokens'] / step['seconds']:,.0f} "
            f"| {step['matrix_rate'] / GB:,.0f} | {step['peak_bytes'] / GB:.2f} |"
        )
    return "\n".join(lines)


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


def write(found: Mapping[str, Any]) -> None:
    """Put the tables into the page, and draw the picture."""
    put("training", text(found))
    draw(read(found)[1], PICTURE)


if __name__ == "__main__":
    write(files.read_json(RESULTS))
    print(PAGE)
