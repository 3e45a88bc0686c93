"""Bounds on foreign input: CPU time, memory, kind of file, depth and size of YAML."""

import os
import resource
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, events
from ruamel.yaml.error import YAMLError

from stages.shared.core.errors import UserError

# `kernels`, where installed, fetches code from the hub and runs it: transformers asks it unless
# this is set, bitsandbytes always on a CPU with AVX512-BF16. With None an import of it fails.
os.environ["USE_HUB_KERNELS"] = "NO"
sys.modules["kernels"] = None  # type: ignore[assignment]

SECONDS = 10.0  # of CPU: another busy process makes no difference
MEMORY = 1 << 30  # bytes
_DEPTH, _NODES, _BYTES = 20, 100_000, 1 << 20  # of YAML; nodes with aliases expanded


class Exceeded(Exception):  # noqa: N818  (the message completes a sentence)
    """Foreign data or code took too much: "takes more than 10 seconds of CPU time"."""


@contextmanager
def limited(seconds: float | None = None, memory: int | None = None) -> Iterator[None]:
    """Raise `Exceeded` where the block takes more CPU seconds, or more bytes on top of today's.

    By the process's timer and its RLIMIT_DATA, so that a regular expression, a template and a
    decoder in C are bounded alike. Only a main thread hears signals: in others nothing is bounded.
    """
    seconds, memory = seconds or SECONDS, memory or MEMORY
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Exceeded(f"takes more than {seconds:g} seconds of CPU time")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limits = [limit for limit in (held + memory, soft) if limit != resource.RLIM_INFINITY]
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGPROF, signal.signal(signal.SIGPROF, stop))
        stack.callback(resource.setrlimit, resource.RLIMIT_DATA, (soft, hard))
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
        stack.callback(signal.setitimer, signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again, where a library passed over it
        try:
            yield
        except MemoryError:
            raise Exceeded(f"takes more than {memory / 1e9:.1f} GB of memory") from None


def require_regular(path: Path) -> Path:
    """Refuse a folder, a pipe or a device, which would be read for ever; a missing file passes."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise UserError(f"{path}: is {what}; expected a file. Remove or rename it.")
    return path


def require_small_yaml(path: Path) -> None:
    """Refuse a YAML file that is too large, too deep, or too large once aliases are expanded."""
    if require_regular(path).exists():
        with path.open("rb") as file, suppress(YAMLError):  # whoever reads it says what is wrong
            text = file.read(_BYTES + 1)
            if len(text) > _BYTES:
                raise UserError(f"{path}: has more than {_BYTES:,} bytes. Write it plainly.")
            _require_small(YAML(typ="safe", pure=True).parse(text.decode(errors="replace")), path)


def _require_small(parsed: Iterator[Any], path: Path) -> None:
    sizes, open_nodes = dict[str, int](), [("", 0)]  # anchor and nodes of each open collection
    for event in parsed:
        if isinstance(event, events.CollectionStartEvent):
            open_nodes.append((event.anchor or "", 1))
            nodes = 0
        elif isinstance(event, events.CollectionEndEvent):
            anchor, nodes = open_nodes.pop()
            sizes[anchor] = nodes
        elif isinstance(event, events.NodeEvent):  # a scalar, or an alias of a collection
            nodes = sizes.get(event.anchor, 1) if isinstance(event, events.AliasEvent) else 1
        else:
            continue
        open_nodes[-1] = (open_nodes[-1][0], open_nodes[-1][1] + nodes)
        if len(open_nodes) > _DEPTH or open_nodes[-1][1] > _NODES:
            what = "is nested too deeply" if len(open_nodes) > _DEPTH else "expands to too much"
            raise UserError(f"{path}:{event.start_mark.line + 1}: {what}. Write it plainly.")
