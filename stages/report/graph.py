"""The pipeline as a picture: stages in rows, from what is fetched down to the report.

Stages that wait for nothing but the report stand as low as they can, so that the four evaluations
share a row. Of the dependencies between stages, one that follows from others is not drawn. Long
lines are led through a row by a place of their own (Sugiyama, Tagawa and Toda 1981).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise

from stages.report.pipeline import Edges, Stage, edges, reduced

BOX_WIDTH, BOX_HEIGHT = 156, 38
GAP, ROW_HEIGHT, LANE_WIDTH = 16, 84, 12
SWEEPS = 8  # orderings settle in two or three; a sweep costs nothing


@dataclass(frozen=True)
class Box:
    """Where a stage stands: its upper left corner, in pixels."""

    name: str
    desc: str
    x: float
    y: float


@dataclass(frozen=True)
class Line:
    """A piece of a line between two rows, as the `d` of an SVG path; the last has the arrow."""

    d: str
    arrow: bool


@dataclass(frozen=True)
class Drawing:
    """Boxes and the lines between them."""

    width: float
    height: float
    boxes: list[Box]
    paths: list[Line]


def rows(needs: Edges) -> list[list[str]]:
    """The stages by row, each as low as what follows it allows."""
    order = list(TopologicalSorter(needs).static_order())
    from_bottom = dict.fromkeys(order, 0)
    for name in reversed(order):
        for need in needs[name]:
            from_bottom[need] = max(from_bottom[need], from_bottom[name] + 1)
    depth = max(from_bottom.values(), default=-1)
    return [[n for n in needs if depth - from_bottom[n] == row] for row in range(depth + 1)]


def draw(found: Iterable[Stage]) -> Drawing:
    """Lay the stages out."""
    known = {stage.name: stage for stage in found}
    needs = reduced(edges(known.values()))
    levels = rows(needs)
    lines = _lead_long_lines(levels, needs)
    _order(levels, lines)
    center = _centers(levels, known)
    width = max((center[n] + _width(n, known) / 2 for level in levels for n in level), default=0)
    row_of = {name: row for row, level in enumerate(levels) for name in level}

    def top(name: str) -> float:
        return row_of[name] * ROW_HEIGHT + 2

    paths = []
    for above, below in lines:
        x0, x1 = center[above], center[below]
        y0, y1 = top(above) + BOX_HEIGHT, top(below)
        bend = (y0 + y1) / 2
        through = f" V{y1 + BOX_HEIGHT:g}" if below not in known else ""
        d = f"M{x0:g} {y0:g} C{x0:g} {bend:g} {x1:g} {bend:g} {x1:g} {y1:g}{through}"
        paths.append(Line(d, arrow=below in known))
    boxes = [
        Box(name, known[name].desc, center[name] - BOX_WIDTH / 2, top(name))
        for level in levels
        for name in level
        if name in known
    ]
    return Drawing(width + 2, len(levels) * ROW_HEIGHT - ROW_HEIGHT + BOX_HEIGHT + 4, boxes, paths)


def _lead_long_lines(levels: list[list[str]], needs: Edges) -> list[tuple[str, str]]:
    """Lines from row to row; a line over several rows gets a lane in each that it crosses."""
    row_of = {name: row for row, level in enumerate(levels) for name in level}
    lines = []
    for below in needs:
        for above in sorted(needs[below], key=list(needs).index):
            last = above
            for row in range(row_of[above] + 1, row_of[below]):
                lane = f"{above} → {below} at {row}"
                levels[row].append(lane)
                lines.append((last, lane))
                last = lane
            lines.append((last, below))
    return lines


def _order(levels: list[list[str]], lines: list[tuple[str, str]]) -> None:
    """Sort each row by the mean place of its neighbours, downwards and upwards in turn."""
    for sweep in range(SWEEPS):
        pairs = list(pairwise(levels))
        down = sweep % 2 == 0
        for upper, lower in pairs if down else reversed(pairs):
            fixed, moved = (upper, lower) if down else (lower, upper)
            place = {name: index for index, name in enumerate(fixed)}
            neighbours: dict[str, list[int]] = {name: [] for name in moved}
            for above, below in lines:
                mover, anchor = (below, above) if down else (above, below)
                if mover in neighbours and anchor in place:
                    neighbours[mover].append(place[anchor])
            now = {name: index for index, name in enumerate(moved)}
            moved.sort(
                key=lambda n: sum(neighbours[n]) / len(neighbours[n]) if neighbours[n] else now[n]
            )


def _width(name: str, known: Mapping[str, Stage]) -> float:
    return BOX_WIDTH if name in known else LANE_WIDTH


def _centers(levels: list[list[str]], known: Mapping[str, Stage]) -> dict[str, float]:
    """The middle of each place, every row centred on the widest."""
    spans = [sum(_width(n, known) + GAP for n in level) - GAP for level in levels]
    widest = max(spans, default=0)
    center = {}
    for level, span in zip(levels, spans, strict=True):
        x = (widest - span) / 2 + 2
        for name in level:
            center[name] = x + _width(name, known) / 2
            x += _width(name, known) + GAP
    return center
