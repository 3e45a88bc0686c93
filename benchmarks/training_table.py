"""The training benchmark for people: tables, a picture, and the page that holds both.

What a CPU measured that computes in bf16 and one that computes in fp32 stand beside each other.

Reads:  benchmarks/results/training.json, training_fp32.json
Writes: the tables in docs/performance.md, docs/pictures/performance.svg, performance_fp32.svg
Run:    python -m benchmarks.training_table
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.page import PAGE, put
from benchmarks.training_figures import Comparison, Spread, Tried, better_mode
from benchmarks.training_picture import draw
from stages.shared.core import files


@dataclass(frozen=True)
class Place:
    """Where a run is kept and shown: its results, its picture, and its mark in the page."""

    results: Path
    picture: Path
    mark: str


# By what was computed in.
PLACES = {
    "bf16": Place(
        Path("benchmarks/results/training.json"),
        Path("docs/pictures/performance.svg"),
        "training",
    ),
    "fp32": Place(
        Path("benchmarks/results/training_fp32.json"),
        Path("docs/pictures/performance_fp32.svg"),
        "training in fp32",
    ),
}
GB = 1e9
# What the step is meant to reach, beside the peer's better mode.
AIMED_RATIO = {"stock": 3.0, "jemalloc": 2.0}
AIMED_MEMORY, AIMED_SHARE = 0.6, 0.5


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
        + f", trl {found['trl']}; in {found['computed_in']}. "
        f"The probes found {min(r.low for r in rates) / GB:,.0f} to "
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
        f"{'fused' if because is None else f'not fused ({because})'}, "
        f"{resolved['workers']} side by side"
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
    """What was aimed at, and what came of it on each set of conversations with each allocator."""
    lines = [
        f"The aim is {AIMED_RATIO['stock']:g} times the tokens a second of trl's better mode with "
        f"the stock allocator and {AIMED_RATIO['jemalloc']:g} times with jemalloc, at most "
        f"{AIMED_MEMORY} of its memory, and {AIMED_SHARE:.0%} of the matrix-product bound. Found:",
        "",
    ]
    for data, allocator in dict.fromkeys((one.data, one.allocator) for one in compared):
        one = better_mode(compared, data, allocator)
        share = one.share_of_bound("ours").median
        lines.append(
            f"- {data}, {allocator} allocator, trl {one.mode}: {one.ratio.median:.2f} times its "
            f"tokens a second ({reached(one.ratio.median >= AIMED_RATIO[allocator])}), "
            f"{one.memory_ratio:.2f} of its memory ({reached(one.memory_ratio <= AIMED_MEMORY)}), "
            f"{share:.0%} of the bound ({reached(share >= AIMED_SHARE)})"
        )
    return "\n".join(lines)


def reached(is_so: bool) -> str:
    """In words."""
    return "reached" if is_so else "not reached"


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


def write(found: Mapping[str, Any]) -> None:
    """Put the tables into the page, and draw the picture."""
    place = PLACES[found["computed_in"]]
    put(place.mark, text(found))
    draw(read(found)[1], place.picture)


if __name__ == "__main__":
    for place in PLACES.values():
        write(files.read_json(place.results))
    print(PAGE)
