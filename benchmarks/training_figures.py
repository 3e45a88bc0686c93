"""What was measured of two trainings in turn, and the figures that are made of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any, NamedTuple

WHOSE = ("ours", "peer")
Step = Mapping[str, float]  # what a worker answered; `seconds`, `matrix_rate`, `tokens` and others


class Spread(NamedTuple):
    """A median between two quartiles."""

    low: float
    median: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """The median and the quartiles."""
    found = list(values)
    if len(found) == 1:
        return Spread(found[0], found[0], found[0])
    return Spread(*quantiles(found, n=4, method="inclusive"))


@dataclass(frozen=True)
class Tried:
    """A step of the peer, unpacked, with one size of its micro-batch."""

    data: str
    micro_batch: int
    step: Step

    @property
    def tokens_per_product(self) -> float:
        """Tokens in the time of a fixed amount of matrix products: what a faster spell leaves."""
        return self.step["tokens"] / self.step["seconds"] / self.step["matrix_rate"]

    @property
    def line(self) -> str:
        """For a terminal."""
        rate = self.step["tokens"] / self.step["seconds"]
        return (
            f"{self.data}: trl in micro-batches of {self.micro_batch}: {rate:,.0f} tokens/s "
            f"at {self.step['matrix_rate'] / 1e9:,.0f} GFLOP/s"
        )


def middle(tried: Iterable[Tried]) -> Tried:
    """Of an odd number of steps the one in the middle."""
    in_order = sorted(tried, key=lambda one: one.tokens_per_product)
    return in_order[len(in_order) // 2]


def best(tried: Iterable[Tried], data: str) -> int:
    """The size of a micro-batch with which the peer is fastest on these conversations."""
    of_data = [one for one in tried if one.data == data]
    return max(of_data, key=lambda one: one.tokens_per_product).micro_batch


@dataclass(frozen=True)
class Comparison:
    """Steps of ours and of the peer in turn, on the same conversations.

    Attributes:
        data: the conversations' name.
        allocator: stock or jemalloc.
        micro_batch: of the peer, in conversations; None where it packs.
        pack_tokens: of a packed row; None where it does not pack.
        before_bytes: resident in each process before its first step.
        resolved: how ours computes a step.
        rounds: what each answered, and `bound_operations` of the step; the first is a warm-up.
    """

    data: str
    allocator: str
    micro_batch: int | None
    pack_tokens: int | None
    before_bytes: Mapping[str, int]
    resolved: Mapping[str, Any]
    rounds: list[dict[str, Any]]

    @property
    def mode(self) -> str:
        """Of the peer."""
        return "packed" if self.micro_batch is None else "unpacked"

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.data}, {self.allocator} allocator, trl {self.mode}"

    @property
    def measured(self) -> Sequence[Mapping[str, Any]]:
        """The rounds that count."""
        return self.rounds[1:]

    def tokens_per_second(self, whose: str) -> Spread:
        """Real tokens, padding left out."""
        return spread(one[whose]["tokens"] / one[whose]["seconds"] for one in self.measured)

    def share_of_bound(self, whose: str) -> Spread:
        """The time of a step's products alone, at the rate just before it, over all its time."""
        return spread(
            one["bound_operations"] / one[whose]["matrix_rate"] / one[whose]["seconds"]
            for one in self.measured
        )

    @property
    def ratio(self) -> Spread:
        """Ours to the peer's tokens a second, of each round."""
        return spread(one["peer"]["seconds"] / one["ours"]["seconds"] for one in self.measured)

    @property
    def ratio_at_one_rate(self) -> Spread:
        """The same where both steps of a round are scaled to one matrix rate."""
        return spread(_work(one["peer"]) / _work(one["ours"]) for one in self.measured)

    def peak_bytes(self, whose: str) -> int:
        """The most that was resident in any step."""
        return max(one[whose]["peak_bytes"] for one in self.rounds)

    @property
    def memory_ratio(self) -> float:
        """Ours to the peer's peak."""
        return self.peak_bytes("ours") / self.peak_bytes("peer")

    @property
    def matrix_rate(self) -> Spread:
        """Operations a second, as the probes of both found it."""
        return spread(one[whose]["matrix_rate"] for one in self.measured for whose in WHOSE)

    @property
    def padding(self) -> float:
        """The share of the peer's positions that are padding."""
        computed = sum(one["peer"]["computed_tokens"] for one in self.measured)
        return 1 - sum(one["peer"]["tokens"] for one in self.measured) / computed

    @property
    def line(self) -> str:
        """For a terminal."""
        return (
            f"{self.name}: {self.ratio.median:.2f} times its tokens a second "
            f"({self.ratio.low:.2f} to {self.ratio.high:.2f}), {self.memory_ratio:.2f} times its "
            f"memory, {self.share_of_bound('ours').median:.0%} of the matrix-product bound "
            f"({self.share_of_bound('peer').median:.0%}), {len(self.measured)} rounds"
        )


def _work(step: Step) -> float:
    """What the machine could have computed in the meantime."""
    return step["seconds"] * step["matrix_rate"]


def better_mode(compared: Iterable[Comparison], data: str, allocator: str) -> Comparison:
    """Of unpacked and packed, the comparison in which the peer itself is faster."""
    those = [one for one in compared if (one.data, one.allocator) == (data, allocator)]
    return max(those, key=lambda one: one.share_of_bound("peer").median)
