"""Watcher: a fork that speaks for a command which no longer can, and frees it of stopped children.

A command that SIGKILL or a crash ends says nothing; one whose child was stopped (SIGSTOP) would
wait for it without end.
"""

import os
import re
import resource
import select
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERVAL = 1.0  # seconds between two looks at the children
PATIENCE = 10  # looks at which a child is stopped, and its parent is not: then it is killed

_pipes: list[int] = []  # to the watchers of this process


@contextmanager
def watched(command: str) -> Iterator[None]:
    """Watch this process while the block runs, whose end is a byte in a pipe."""
    reader, writer = os.pipe()
    parent = os.getpid()
    if (child := os.fork()) == 0:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        os.close(writer)
        _watch(parent, reader, command)
        os._exit(0)
    os.close(reader)
    _pipes.append(writer)
    try:
        yield
    finally:
        _pipes.remove(writer)
        with suppress(OSError), os.fdopen(writer, "wb", buffering=0) as pipe:
            pipe.write(b".")  # it may have been killed itself
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def dismiss() -> None:
    """Send the watchers home: this process has said why it ends, and does so at once."""
    for pipe in _pipes:
        with suppress(OSError):
            os.writev(pipe, [b"."])


def _watch(parent: int, reader: int, command: str) -> None:
    kills, stopped = _out_of_memory_kills(), Counter[int]()
    while not select.select([reader], [], [], INTERVAL)[0]:
        paused = _state(parent) == "T"  # Ctrl-Z stops all of them
        found = [p for p in _descendants(parent) if _state(p) == "T" and not paused]
        stopped = Counter({process: stopped[process] + 1 for process in found})
        for process, looks in stopped.items():
            if looks >= PATIENCE:
                with suppress(OSError):
                    os.kill(process, signal.SIGKILL)
    if os.read(reader, 1):
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    why = "SIGKILL or a crash, mostly for want of memory"
    if _out_of_memory_kills() > kills:
        why = "the kernel ran out of memory"
    elif limit != resource.RLIM_INFINITY:
        why = f"SIGKILL or a crash; `ulimit -v` allows it {limit / 2**30:.1f} GiB"
    line = f"\nerror: {command}: ended without a word ({why}). Free memory, and run it again."
    print(line, file=sys.stderr, flush=True)  # a progress bar may stand in the line before


def _descendants(process: int) -> Iterator[int]:
    with suppress(OSError):  # it has ended
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            for child in map(int, path.read_text().split()):
                yield child
                yield from _descendants(child)


def _state(process: int) -> str:
    """R(unning), S(leeping), T (stopped) and others; "" once it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _out_of_memory_kills() -> int:
    """Processes that the kernel has killed for want of memory, since it booted."""
    found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
