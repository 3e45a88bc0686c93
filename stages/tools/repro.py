"""`dvc repro` with a line a stage: which of how many it is, and why it runs.

Reads:  dvc.yaml, dvc.lock, params.yaml
Run:    python -m stages.tools.repro
"""

import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.shared.core.command import run
from stages.shared.core.errors import reading

PARAMS = "params.yaml"
SHOWN = 3
_ENDINGS = {
    re.compile(r"Running stage '(.+)':"): "{reason}",
    re.compile(r"Stage '(.+)' didn't change, skipping"): ": unchanged",
    re.compile(r"Stage '(.+)' is cached"): ": restored from the run cache",
}
# What to type is said once, at the end.
_ADVICE = re.compile(
    r"> python|Updating lock file|To (track|enable)|\t(git add|dvc config)|Use `dvc push|$"
)


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


def shorten(lines: Iterable[str], count: int, why: Mapping[str, str]) -> Iterator[str]:
    """DVC's lines, one for each of `count` stages instead of four.

    A stage that has no reason in `why` follows those before it.
    """
    number = 0
    for line in lines:
        for pattern, ending in _ENDINGS.items():
            if match := pattern.match(line):
                number += 1
                reason = f" ({why[match[1]]})" if match[1] in why else ""
                yield f"[{number}/{count}] {match[1]}{ending.format(reason=reason)}"
                break
        else:
            if not _ADVICE.match(line):
                yield line


def main() -> None:
    """Run `dvc repro`; its exit code is this one's."""
    from dvc.repo import Repo  # noqa: PLC0415  (half a second that --help need not pay)

    yaml, lock = YAML(typ="safe"), Path("dvc.lock")
    with reading("dvc.yaml or dvc.lock", "Restore it by git."), Repo() as repo:
        locked = (yaml.load(lock) or {}).get("stages", {}) if lock.exists() else {}
        why = reasons(repo.status(), locked, yaml.load(Path(PARAMS)))
        count = len(repo.index.stages)
    command = [sys.executable, "-m", "dvc", "repro"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dvc:  # noqa: S603
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # DVC and its stage hear the terminal's
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: dvc.send_signal(number))
        assert dvc.stdout is not None
        for line in shorten(map(str.rstrip, dvc.stdout), count, why):
            print(line, flush=True)
    sys.exit(dvc.returncode)


if __name__ == "__main__":
    run(main)
