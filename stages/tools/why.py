"""Why `dvc repro` would run a stage, for `make repro`: a line for each that has changed itself.

Reads:  dvc.yaml, dvc.lock, params.yaml
Run:    python -m stages.tools.why
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.shared.core.errors import reading, run

PARAMS = "params.yaml"
SHOWN = 3


def reasons(
    status: Mapping[str, list[Any]], locked: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, str]:
    """Stage → "params lora.r; deps stages/train".

    Args:
        status: what `dvc status --json` prints.
        locked: `stages` of dvc.lock.
        params: params.yaml.
    """
    return {
        stage: "; ".join(_changes(entries, locked[stage].get("params", {}), params))
        if stage in locked
        else "not run before"
        for stage, entries in status.items()
    }


def _changes(
    entries: list[Any], locked: Mapping[str, Any], params: Mapping[str, Any]
) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):  # "changed command"
            yield entry
            continue
        for what, changed in entry.items():
            is_file = isinstance(changed.get(PARAMS), str)  # of the report
            names = [name for name in changed if is_file or name != PARAMS]
            before, sections = locked.get(PARAMS, {}), {} if is_file else changed.get(PARAMS, {})
            keys = [key for name in sections for key in _keys(name, before, params)]
            yield from _listed("params", keys)
            yield from _listed(what.removeprefix("changed "), names)


def _keys(name: str, locked: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """The keys of a section that differ; the name where it is no section, or was none."""
    before, now = locked.get(name), params.get(name)
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [name]
    differ = [key for key in before | now if before.get(key) != now.get(key)]
    return [f"{name}.{key}" for key in differ] or [name]


def _listed(what: str, names: list[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield f"{what} {', '.join(names[:SHOWN])}{more}"


def main() -> None:
    """Print the reasons."""
    from dvc.repo import Repo  # noqa: PLC0415  (half a second that --help need not pay)

    yaml, lock = YAML(typ="safe"), Path("dvc.lock")
    with reading("dvc.yaml or dvc.lock", "Restore it by git."), Repo() as repo:
        locked = (yaml.load(lock) or {}).get("stages", {}) if lock.exists() else {}
        found = reasons(repo.status(), locked, yaml.load(Path(PARAMS)))
    for stage, reason in found.items():
        print(f"{stage}\t{reason}")


if __name__ == "__main__":
    run(main)
