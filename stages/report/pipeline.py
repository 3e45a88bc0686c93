"""The stages of dvc.yaml, and which of them waits for which."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

Edges = dict[str, set[str]]  # stage → the stages that it waits for


@dataclass(frozen=True)
class Stage:
    """A stage, or one of those that a `foreach` makes."""

    name: str
    desc: str
    deps: list[str]
    outs: list[str]


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
