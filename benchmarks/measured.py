"""One piece of work, timed, with the memory of its process, told in one line of JSON."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path


def tell(work: Callable[[], dict[str, int]]) -> None:
    """Do the work, and print what it returns with `seconds`, `cpu_seconds` and `peak_bytes`.

    Processes that the work started and waited for count in the CPU time, and not in the memory.
    """
    began, cpu_began = time.perf_counter(), sum(os.times()[:4])
    figures: dict[str, float] = {**work()}
    figures["seconds"] = time.perf_counter() - began
    figures["cpu_seconds"] = sum(os.times()[:4]) - cpu_began
    figures["peak_bytes"] = peak_bytes()
    print(json.dumps(figures))


def peak_bytes() -> int:
    """The most memory that was resident at once.

    Of this program alone: `getrusage` also counts what the parent held when it started it.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    [kibibytes] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(kibibytes)
