"""A pipeline of which every stage has run on the tiny model, and its stages run in forks.

Forked from a process that has imported their libraries, a stage costs a second instead of five.
"""

import ctypes
import fcntl
import json
import os
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from stages.shared.core import files
from stages.shared.core.errors import SIGNALS
from tests import tiny, workspace
from tests.test_contract import declared, outs_of
from tests.test_pipeline import SMALL, write_conversations

LIMIT = 120.0  # seconds of a try; undamaged, the longest takes some ten on a busy machine
STAGES = ["fetch_data", "fetch_model", *(s for s in declared() if not s.startswith("fetch"))]
RUN_DEPENDENT = ("tokens_per_second", "peak_memory_bytes", "resumed_from_step")


@dataclass
class Ended:
    """How a stage ended."""

    code: int | None  # None: it did not
    said: str
    seconds: float


@dataclass(frozen=True)
class Pipeline:
    """A workspace in which every stage has run, and what their outs are."""

    root: Path
    outs: dict[str, dict[str, str]]  # by stage: path → hash
    seconds: dict[str, float]


def run(root: Path, stage: str, before: Callable[[], Any] | None = None, **how: Any) -> Ended:
    """Run a stage in a fork. `before` runs there first; see `_wait` for the rest."""
    reader, writer = os.pipe()  # a file would be under the limits of a try
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.set_blocking(reader, False)  # an orphan may hold its other end
    started = time.monotonic()
    if (child := os.fork()) == 0:
        os.setsid()
        os.chdir(root)
        for number in SIGNALS:  # as a command begins, also where this one is in a background
            default = signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler
            signal.signal(number, default)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # as `stages` does
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor in (1, 2):
            os.dup2(writer, descriptor)
        obey_permissions()
        _as_a_command(stage, before)
    os.close(writer)
    status = _wait(child, **how)
    said = ""
    with suppress(BlockingIOError):  # nothing yet of an orphan
        said = os.read(reader, 1 << 20).decode(errors="replace")
    os.close(reader)
    return Ended(status, said, time.monotonic() - started)


def _as_a_command(stage: str, before: Callable[[], Any] | None) -> NoReturn:
    """`python -m stages.<name>` as the interpreter runs it."""
    module, _, variant = stage.partition("@")
    sys.argv = [module, *([variant] if variant else [])]
    code: Any = 1
    try:
        if before:
            before()
        runpy.run_module(f"stages.{module}", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code or 0)


def _wait(
    child: int, after: float = LIMIT, number: int = 0, send: Callable[[int, int], None] = os.kill
) -> int | None:
    """Exit code of a child, to which a signal is sent after some seconds; None out of time.

    `send` may reach its children too (`os.killpg`, as a terminal does) or one of them.
    """
    start = time.monotonic()
    while (seconds := time.monotonic() - start) < LIMIT:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if number and seconds >= after:
            send(child, number)
            number = 0
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def make_pipeline(root: Path) -> Pipeline:
    """Run every stage once, and let DVC record the outs in dvc.lock."""
    formats = {"export.formats": ["gguf-f16", "vllm-lora"]}
    space = workspace.make(root, SMALL | {"train.batch_size": 8} | formats)
    write_conversations(root / "mine.jsonl", 40)
    pid = os.fork()
    if pid == 0:  # torch computes in forks alone: none inherits its threads
        tiny.save(root / "my-model")
        os._exit(0)
    os.waitpid(pid, 0)
    space.set_params({"model.revision": files.folder_sha256(root / "my-model")})
    seconds = {}
    for stage in STAGES:
        ended = run(root, stage)
        assert ended.code == 0, f"{stage}: {ended}"
        seconds[stage] = ended.seconds
    done = space.dvc("commit", "--force", "--quiet")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(root / ".dvc/cache")
    run(root, "report")  # it shows hashes of dvc.lock
    outs = {stage: hashes(root, stage) for stage in STAGES}
    return Pipeline(root, outs, seconds)


def files_below(root: Path, names: list[str]) -> Iterator[str]:
    """Files, and all files below folders, by their path from `root`."""
    for name in names:
        path = root / name
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (str(p.relative_to(root)) for p in below if p.exists() and not p.is_dir())


def hashes(root: Path, stage: str) -> dict[str, str]:
    """Hash of each out, without what differs from run to run."""
    found = {}
    for name in files_below(root, outs_of(declared()[stage])):
        path = root / name
        if path.is_file() and name == "reports/train.json":
            values = json.loads(path.read_bytes())
            kept = {k: v for k, v in values.items() if not k.endswith(RUN_DEPENDENT)}
            found[name] = json.dumps(kept, sort_keys=True)
        else:
            found[name] = files.sha256(path) if path.is_file() else "none"
    return found


def obey_permissions() -> None:
    """Give up root's right to every file (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: of the first 32, the others
    libc = ctypes.CDLL(None)
    libc.capget(header, sets)
    for index in range(3):
        sets[index] &= ~0b110
    libc.capset(header, sets)
