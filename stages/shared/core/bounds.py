"""Bounds on foreign code and data: CPU time, memory, panics of native code, no code of the hub."""

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Raise `Exceeded` where the block takes more CPU seconds, or `MEMORY` more than before.

    The process's timer and RLIMIT_DATA bound a regular expression and a decoder in C too. Only a
    main thread hears signals: in others nothing is bounded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Exceeded(f"takes more than {seconds:g} seconds of CPU time")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limits = [limit for limit in (held + MEMORY, soft) if limit != resource.RLIM_INFINITY]
    handler = signal.signal(signal.SIGPROF, stop)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
        signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again, where a library swallowed it
        yield
    except MemoryError:
        raise Exceeded(f"takes more than {MEMORY / 1e9:.1f} GB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGPROF, handler)


@contextmanager
def without_panic_output() -> Iterator[None]:
    """Hold back stderr, and drop it where the block raises: Rust prints its panics itself."""
    stderr = os.dup(2)
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
