"""`dvc repro` after checks of what DVC would refuse in its own words, with a line a stage.

The line says which of how many it is, and why it runs. Checked are params.yaml, `data.path`, locks
of processes that are gone, and who can write DVC's cache of hashes.

Reads:  dvc.yaml, dvc.lock, params.yaml
Run:    python -m stages.tools.repro
"""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.shared.core import params
from stages.shared.core.command import quick_imports, run
from stages.shared.core.errors import UserError, reading, require_regular

DVC = Path(".dvc/tmp")
RWLOCK, DVC_LOCK = DVC / "rwlock", Path("dvc.lock")
FIRST_OUTS = (Path("data/raw"), Path("models/base"))
PRECISION = 1.0  # seconds of a process's start time, as Linux tells the time of the boot
ADVICE = "Remove it, or export DVC_SITE_CACHE_DIR=$HOME/.cache/dvc-hashes."
SHOWN = 3  # keys or files of a reason
_STAGE = re.compile(r"(?:Running s|S)tage '(.+)'(:| didn't change, skipping| is cached)")
_ENDINGS = {
    " didn't change, skipping": ": unchanged",
    " is cached": ": restored from the run cache",
}
# What to type is said once, at the end.
_ADVICE = re.compile(
    r"> python|Updating lock file|To (track|enable)|\t(git add|dvc config)|Use `dvc push|$"
)


def require_data(path: str) -> None:
    """Raise a `UserError` for a path that DVC cannot depend on, whatever `data.source` is."""
    key, target = f"{params.FILE}: data.path is {path!r}", Path(path)
    if "://" in path:
        raise UserError(f"{key}, a URL. Download it, or set data.source to hub and data.repo.")
    if path.startswith("~"):
        raise UserError(f"{key}, and no shell expands it. Write {str(target.expanduser())!r}.")
    if not path.strip() or not (target.is_file() or target.is_dir()):
        raise UserError(f"{key}, which is no file or folder. Correct it; DVC depends on it always.")
    for file in target.rglob("*"):
        if file.exists() and not file.is_dir():
            require_regular(file)  # DVC would wait for ever at a pipe
    for out in (out.resolve() for out in FIRST_OUTS):
        if out.is_relative_to(target.resolve()) or target.resolve().is_relative_to(out):
            raise UserError(f"{key}, where stages write. Put the conversations elsewhere.")


def require_own(folder: Path) -> None:
    """Raise a `UserError` where others can write the cache of hashes, which DVC unpickles.

    On a shared machine whoever does runs code as the user of DVC. DVC lets all users write to the
    two folders above it; of one's own the sticky bit is set: they can add there but not replace.
    """
    for parent in folder.parents[:2]:
        mode, owner = parent.stat().st_mode, parent.stat().st_uid
        replaceable = mode & stat.S_IWOTH and not mode & stat.S_ISVTX
        if replaceable and owner == os.getuid():
            parent.chmod(stat.S_IMODE(mode) | stat.S_ISVTX)
        elif replaceable or owner not in (0, os.getuid()):
            raise UserError(f"{parent}: other users can replace what DVC unpickles. {ADVICE}")
    for path in (folder, *folder.rglob("*")):
        info = path.lstat()
        group = info.st_mode & stat.S_IWGRP and info.st_gid != os.getgid()
        if info.st_uid not in (0, os.getuid()) or info.st_mode & stat.S_IWOTH or group:
            raise UserError(f"{path}: other users can write what DVC unpickles. {ADVICE}")


def release_locks() -> int:
    """Remove the locks of processes that are gone; returns how many.

    DVC names processes by number. In a new container, or after a reboot, another one may have it,
    and DVC would refuse to work until a hand removes the file.
    """
    from dvc.lock import LockError, make_lock  # noqa: PLC0415  (half a second)

    if not RWLOCK.is_file():
        return 0
    try:
        with make_lock(str(DVC / "rwlock.lock"), tmp_dir=str(DVC)), reading(RWLOCK):
            written = RWLOCK.stat().st_mtime
            locks = {"read": {}, "write": {}} | json.loads(RWLOCK.read_text() or "{}")
            read = {
                path: [info for info in readers if _is_held(info, written)]
                for path, readers in locks["read"].items()
            }
            write = {p: info for p, info in locks["write"].items() if _is_held(info, written)}
            held = {"read": {path: own for path, own in read.items() if own}, "write": write}
            if held != locks:
                RWLOCK.write_text(json.dumps(held))
    except LockError:  # another DVC is at work on the file: it is no stale one
        return 0
    return sum(len(locks[kind]) - len(held[kind]) for kind in held)


def _is_held(info: dict[str, Any], written: float) -> bool:
    """Whether the process that took a lock lives: it began before, with the same arguments."""
    import psutil  # noqa: PLC0415  (DVC's)

    try:
        process = psutil.Process(int(info["pid"]))
        words = " ".join(process.cmdline()).split()
        arguments = str(info["cmd"]).split()[1:]
        same = words[len(words) - len(arguments) :] == arguments
        return process.create_time() <= written + PRECISION and same
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def reasons(
    status: Mapping[str, list[Any]], locked: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, str]:
    """Stage → "params lora.r; deps stages/train".

    Of what `dvc status --json` prints, `stages` of dvc.lock and the values of params.yaml.
    """
    why, file = {}, str(params.FILE)
    for stage, entries in status.items():
        before = locked.get(stage, {}).get("params", {}).get(file, {})
        parts = [entry for entry in entries if isinstance(entry, str)]  # "changed command"
        missing: list[str] = []  # outs, or else dependencies, which another stage will write
        for what, changed in (item for e in entries if isinstance(e, dict) for item in e.items()):
            kind, names = what.removeprefix("changed "), dict(changed)
            if isinstance(changed.get(file), dict):  # the report depends on the file itself
                sections = names.pop(file)
                keys = [key for name in sections for key in _keys(name, before, values)]
                parts.append(_listed("params", keys))
            if deleted := [name for name, state in names.items() if state == "deleted"]:
                missing = deleted if kind == "outs" else missing or deleted
            if modified := [name for name in names if name not in deleted]:
                parts.append(_listed(kind, modified))
        parts += [_listed("missing", missing)] if missing else []
        why[stage] = "; ".join(parts) if stage in locked else "not run before"
    return why


def _keys(name: str, locked: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """The keys of a section that differ; the name where it is no section, or was none."""
    before, now = locked.get(name), values.get(name)
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [name]
    differ = [f"{name}.{key}" for key in before | now if before.get(key) != now.get(key)]
    return differ or [name]


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what} {', '.join(names[:SHOWN])}{more}"


def shorten(lines: Iterable[str], count: int, why: Mapping[str, str]) -> Iterator[str]:
    """DVC's lines, one for each of `count` stages instead of four.

    A stage that has no reason in `why` follows those before it.
    """
    number = 0
    for line in lines:
        if match := _STAGE.match(line):
            number += 1
            stage, event = match.groups()
            reason = f" ({why[stage]})" if stage in why else ""
            yield f"[{number}/{count}] {stage}{_ENDINGS.get(event, reason)}"
        elif not _ADVICE.match(line):
            yield line


def check() -> dict[str, Any]:
    """Check params.yaml, whose values are returned, and data.path; release stale locks."""
    with reading(params.FILE, "Correct it; it is YAML in UTF-8."):
        values = params.read_file()
    params.check(values)
    require_data(values["data"]["path"])
    if removed := release_locks():
        print(f"{RWLOCK}: {removed} locks of processes that are gone were removed", flush=True)
    return values


def main() -> None:
    """Check, and run `dvc repro`; its exit code is this one's."""
    values = check()
    with quick_imports():
        from dvc.repo import Repo  # noqa: PLC0415

    # The repository opens its databases, and unpickles nothing yet.
    with reading(f"dvc.yaml or {DVC_LOCK}", "Restore it by git."), Repo() as repo:
        require_own(Path(repo.site_cache_dir))
        lock = (YAML(typ="safe").load(DVC_LOCK) if DVC_LOCK.exists() else None) or {}
        why, count = reasons(repo.status(), lock.get("stages", {}), values), len(repo.index.stages)
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
