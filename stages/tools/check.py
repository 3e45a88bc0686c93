"""Check what DVC would refuse in words of its own: params.yaml, data.path, and stale locks.

Run:    python -m stages.tools.check      (`make repro` does, before `dvc repro`)

DVC's lock file names processes by number. In a new container, or after a reboot, another process
may have that number, and DVC refuses to work until a hand removes the file.
"""

import json
from pathlib import Path
from typing import Any

from stages.shared.core import params
from stages.shared.core.command import run
from stages.shared.core.errors import UserError, reading, require_regular

DVC = Path(".dvc/tmp")
LOCK = DVC / "rwlock"
FIRST_OUTS = (Path("data/raw"), Path("models/base"))
PRECISION = 1.0  # seconds of a process's start time, as Linux tells the time of the boot


def require_data(path: str) -> None:
    """Raise a `UserError` for a path that DVC cannot depend on, whatever `data.source` is."""
    key, found = f"{params.FILE}: data.path is {path!r}", Path(path)
    if "://" in path:
        raise UserError(f"{key}, a URL. Download it, or set data.source to hub and data.repo.")
    if path.startswith("~"):
        raise UserError(f"{key}, and no shell expands it. Write {str(found.expanduser())!r}.")
    if not path.strip() or not (found.is_file() or found.is_dir()):
        raise UserError(f"{key}, which is no file or folder. Correct it; DVC depends on it always.")
    for file in found.rglob("*"):
        if file.exists() and not file.is_dir():
            require_regular(file)  # DVC would wait for ever at a pipe
    for out in (out.resolve() for out in FIRST_OUTS):
        if out.is_relative_to(found.resolve()) or found.resolve().is_relative_to(out):
            raise UserError(f"{key}, where stages write. Put the conversations elsewhere.")


def release_locks() -> int:
    """Remove the locks of processes that are gone; returns how many."""
    from dvc.lock import LockError, make_lock  # noqa: PLC0415  (half a second)

    if not LOCK.is_file():
        return 0
    try:
        with make_lock(str(DVC / "rwlock.lock"), tmp_dir=str(DVC)), reading(LOCK):
            written, locks = LOCK.stat().st_mtime, json.loads(LOCK.read_text() or "{}")
            kept: dict[str, dict[str, Any]] = {"read": {}, "write": {}}
            for path, infos in locks.get("read", {}).items():
                if held := [info for info in infos if _is_held(info, written)]:
                    kept["read"][path] = held
            for path, info in locks.get("write", {}).items():
                if _is_held(info, written):
                    kept["write"][path] = info
            if kept != locks:
                LOCK.write_text(json.dumps(kept))
    except LockError:  # another DVC is at work on the file: it is no stale one
        return 0
    return sum(len(locks.get(kind, {})) - len(kept[kind]) for kind in kept)


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


def main() -> None:
    """Check, and say what was removed."""
    with reading(params.FILE, "Correct it; it is YAML in UTF-8."):
        whole = params.read_file()
    params.check(whole)
    require_data(whole["data"]["path"])
    if removed := release_locks():
        print(f"{LOCK}: {removed} locks of processes that are gone were removed")


if __name__ == "__main__":
    run(main)
