"""Bounds: what would take for ever, or all memory, ends; what the block changed is put back."""

import os
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from stages.shared.core import bounds
from stages.shared.core.errors import UserError


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


def test_require_regular_refuses_what_is_read_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, what in (
        (tmp_path / "pipe", "a pipe"),
        (Path("/dev/zero"), "a device"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(UserError, match=f"{path}: is .*{what}"):
            bounds.require_regular(path)
    bounds.require_regular(tmp_path / "missing")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "a: &a [1, 1]\n"
            + "".join(
                f"{c}: &{c} [{f'*{b}, ' * 9}]\n" for b, c in zip("abcdef", "bcdefg", strict=True)
            ),
            ":6: expands to too much",
        ),
        ("[" * 5000, ":1: is nested too deeply"),
        ("a:\n" + "".join("  " * n + "- b:\n" for n in range(1, 30)), "is nested too deeply"),
        ("#" * (1 << 20) + "\n", "has more than 1,048,576 bytes"),
    ],
)
def test_yaml_without_bound_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=reason):
        bounds.require_small_yaml(tmp_path / "params.yaml")


def test_plain_yaml_with_anchors_passes(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("a: &a {b: [1, 2]}\nc: *a\nd: {<<: *a, e: &s 5}\nf: *s\n")
    bounds.require_small_yaml(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")  # DVC says what is wrong
    bounds.require_small_yaml(tmp_path / "params.yaml")
