"""Launcher: sums, errors and signals of processes that train together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stages.shared.core.errors import UserError
from stages.shared.parallel import launcher
from stages.shared.parallel.group import Group
from stages.shared.parallel.interruption import Interruption
from stages.train.checkpoints import claim

CPU = torch.device("cpu")


def total(group: Group, device: torch.device, start: float) -> list[float]:
    sums = [torch.full((2,), start + group.rank), torch.tensor(1.0)]
    group.all_reduce(sums)
    return [*sums[0].tolist(), sums[1].item(), float(any(group.gather(group.rank == 1)))]


def fails(group: Group, device: torch.device) -> None:
    if group.rank == 1:
        raise UserError("row 3 is wrong")
    group.wait()


def is_killed(group: Group, device: torch.device) -> None:
    """As the kernel does where memory runs out; the other waits for it."""
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.wait()


def vanishes(group: Group, device: torch.device) -> None:
    """A library ends the process: no error, no answer, exit code 0."""
    if group.rank == 0:
        os._exit(0)
    group.wait()


@pytest.mark.parametrize("size", [1, 2])
def test_launch_sums_over_all_devices(size: int) -> None:
    expected = [10.0, 10.0, 1.0, 0.0] if size == 1 else [21.0, 21.0, 2.0, 1.0]
    assert launcher.launch(size, CPU, total, 10) == expected


def test_launch_ends_in_the_line_of_the_process_that_failed() -> None:
    with pytest.raises(UserError, match=r"^row 3 is wrong$"):
        launcher.launch(2, CPU, fails)
    with pytest.raises(UserError, match=r"one of 2, was .* from outside \(SIGKILL\)") as killed:
        launcher.launch(2, CPU, is_killed)
    assert "\n" not in str(killed.value)
    with pytest.raises(launcher.WorkerLost, match=r"^one of 2 processes, was .*without a word"):
        launcher.launch(2, CPU, vanishes)


HOLDS = """
import os, sys, time
import torch
from stages.shared.parallel import launcher
from stages.train.checkpoints import Checkpoints, claim
from pathlib import Path
def work(group, device, checkpoints):
    if group.is_main:
        checkpoints.hold()
    os.write(1, b"%d\\n" % os.getpid())  # whole, beside the other's
    time.sleep(60)
if __name__ == "__main__":
    import holds
    with claim(Path(sys.argv[1]), "a", 1) as checkpoints:
        launcher.launch(2, torch.device("cpu"), holds.work, checkpoints)
"""


def test_no_device_outlives_its_launcher_or_its_lock(tmp_path: Path) -> None:
    (tmp_path / "holds.py").write_text(HOLDS)
    training = subprocess.Popen(
        [sys.executable, tmp_path / "holds.py", tmp_path],
        env=os.environ | {"PYTHONPATH": f".:{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert training.stdout is not None
    devices = [int(training.stdout.readline()) for _ in range(2)]
    training.kill()
    training.communicate()
    for _ in range(50):
        if not any(_runs(number) for number in devices):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"still there: {devices}")
    with claim(tmp_path, "a", 1):
        pass


def _runs(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_first_of_two_signals_is_reported() -> None:
    """Ctrl-C reaches every process, and the launcher then sends SIGTERM too."""
    with Interruption() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.heard == signal.SIGINT


def test_a_second_ctrl_c_stops_at_once() -> None:
    with Interruption() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.heard == signal.SIGINT
