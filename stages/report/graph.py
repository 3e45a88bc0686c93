"""The pipeline as a picture: stages in rows, from what is fetched down to the report.

Stages that wait for nothing but the report stand as low as they can, so that the four evaluations
share a row. Of the dependencies between stages, one that follows from others is not drawn. Long
lines are led through a row by a place of their own (Sugiyama, Tagawa and Toda 1981).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise
from typing import Any

BOX_WIDTH, BOX_HEIGHT = 156, 38
GAP, ROW_HEIGHT, LANE_WIDTH = 16, 84, 12
SWEEPS = 8  # orderings settle in two or three; a sweep costs nothing

Edges = dict[str, set[str]]  # stage → the stages that it waits for


@dataclass(frozen=True)
class Stage:
    """A stage, or one of those that a `foreach` makes."""

    name: str
    desc: str
    deps: list[str]
    outs: list[str]


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


def stages(pipeline: Mapping[str, Any]) -> list[Stage]:
    """The stages of dvc.yaml, each `foreach` written out."""
    found = []
    for name, body in (pipeline.get("stages") or {}).items():
        each = body.get("foreach")
        if each is None:
            found.append(_stage(name, body, {}))
            continue
        items = each.items() if isinstance(each, dict) else ((str(e), e) for e in each)
        for key, item in items:
            scope = {"key": key, "item": item}
            if isinstance(item, dict):
                scope |= {f"item.{field}": value for field, value in item.items()}
            found.append(_stage(f"{name}@{key}", body["do"], scope))
    return found


def _stage(name: str, body: Mapping[str, Any], scope: Mapping[str, Any]) -> Stage:
    def paths(*fields: str) -> list[str]:
        entries = [entry for field in fields for entry in body.get(field) or []]
        written = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]
        return [
            re.sub(r"\$\{(.*?)\}", lambda m: str(scope.get(m[1].strip(), m[0])), str(path))
            for path in written
        ]

    return Stage(name, str(body.get("desc", "")), paths("deps"), paths("outs", "metrics", "plots"))


def edges(found: Iterable[Stage]) -> Edges:
    """What each stage waits for: those whose outs it reads, in part or whole."""
    known = list(found)
    return {
        stage.name: {
            other.name
            for other in known
            if other.name != stage.name
            and any(_overlap(dep, out) for dep in stage.deps for out in other.outs)
        }
        for stage in known
    }


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def reduced(needs: Edges) -> Edges:
    """The edges without those that a longer way implies."""
    above: Edges = {}
    for name in TopologicalSorter(needs).static_order():
        above[name] = set(needs[name]).union(*(above[need] for need in needs[name]))
    return {
        name: {n for n in direct if not any(n in above[other] for other in direct)}
        for name, direct in needs.items()
    }


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
