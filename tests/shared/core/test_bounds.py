"""Bounds: what would take for ever, or all memory, ends; what the block changed is put back."""

import re
import resource
import signal
from collections.abc import Callable

import pyarrow as pa
import pytest

from stages.shared.core import bounds


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda: re.fullmatch("(.*)*x", "a" * 40), "0.1 seconds of CPU time"),
        (lambda: "x" * 10**11, "1.1 GB of memory"),
        (lambda: pa.array(["x" * 10**8]).take(pa.array([0] * 50)), "1.1 GB of memory"),
    ],
)
def test_limited_ends_what_takes_too_much(run: Callable[[], object], reason: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGPROF)
    seconds = 0.1 if "seconds" in reason else 60
    with pytest.raises(bounds.Exceeded, match=f"takes more than {reason}"), bounds.limited(seconds):
        run()
    assert before == (resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGPROF))
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_limited_passes_other_errors_on() -> None:
    with pytest.raises(KeyError), bounds.limited():
        raise KeyError("ours")
