"""Bounds on foreign code and data: CPU time, memory, panics of native code, no code of the hub."""

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile

# `kernels`, where installed, fetches code from the hub and runs it: transformers asks it unless
# this is set, bitsandbytes always on a CPU with AVX512-BF16. With None an import of it fails.
os.environ["USE_HUB_KERNELS"] = "NO"
sys.modules["kernels"] = None  # type: ignore[assignment]

SECONDS = 10.0  # of CPU: another busy process makes no difference
MEMORY = 1 << 30  # bytes


class Exceeded(Exception):  # noqa: N818  (the message completes a sentence)
    """Foreign data or code took too much: "takes more than 10 seconds of CPU time"."""


@contextmanager
def limited(seconds: float | None = None) -> Iterator[None]:
    """Raise `Exceeded` where the block takes more CPU seconds, or more bytes on top of today's.

    By the process's timer and its RLIMIT_DATA, so that a regular expression, a template and a
    decoder in C are bounded alike. Only a main thread hears signals: in others nothing is bounded.
    """
    seconds = seconds or SECONDS
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Exceeded(f"takes more than {seconds:g} seconds of CPU time")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limits = [limit for limit in (held + MEMORY, soft) if limit != resource.RLIM_INFINITY]
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGPROF, signal.signal(signal.SIGPROF, stop))
        stack.callback(resource.setrlimit, resource.RLIMIT_DATA, (soft, hard))
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
        stack.callback(signal.setitimer, signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again, where a library passed over it
        try:
            yield
        except MemoryError:
            raise Exceeded(f"takes more than {MEMORY / 1e9:.1f} GB of memory") from None


@contextmanager
def without_panic_output() -> Iterator[None]:
    """Hold back stderr, and drop it where the block raises: Rust prints its panics itself."""
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    with TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
        held.seek(0)
        print(held.read().decode(errors="replace"), end="", file=sys.stderr)
