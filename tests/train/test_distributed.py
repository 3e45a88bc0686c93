"""Processes that train together: their sums, their errors, and how they end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn

from stages.shared.core.errors import UserError
from stages.train import distributed
from stages.train.distributed import Group
from stages.train.interruption import Interruption

CPU = torch.device("cpu")


def total(group: Group, device: torch.device, start: float) -> list[float]:
    sums = [torch.full((2,), start + group.rank), torch.tensor(1.0)]
    group.all_reduce(sums)
    return [*sums[0].tolist(), sums[1].item(), float(group.any(group.rank == 1, device))]


def fails(group: Group, device: torch.device) -> None:
    if group.rank == 1:
        raise UserError("row 3 is wrong")
    group.wait()


def is_killed(group: Group, device: torch.device) -> None:
    """As the kernel does where memory runs out; the other waits for it."""
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.wait()


@pytest.mark.parametrize("size", [1, 2])
def test_launch_sums_over_all_devices(size: int) -> None:
    expected = [10.0, 10.0, 1.0, 0.0] if size == 1 else [21.0, 21.0, 2.0, 1.0]
    assert distributed.launch(size, CPU, total, 10) == expected


def test_launch_ends_in_the_line_of_the_process_that_failed() -> None:
    with pytest.raises(UserError, match=r"^row 3 is wrong$"):
        distributed.launch(2, CPU, fails)
    with pytest.raises(UserError, match=r"one of 2 .* from outside \(SIGKILL\)") as killed:
        distributed.launch(2, CPU, is_killed)
    assert "\n" not in str(killed.value)


class Model(nn.Linear):
    """Weights of 1, whose loss is their sum times a factor."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def step(self, group: Group, factors: list[float]) -> float:
        self.zero_grad()
        loss = torch.stack([p.sum() for p in self.parameters()]).sum() * factors[group.rank]
        loss.backward()
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        group.all_reduce([*gradients, loss.data])
        return loss.item()

    def keep_on(self, group: Group, factors: list[float]) -> None:
        while True:
            group.wait()
            self.step(group, factors)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_workers_sum_gradients_and_see_each_optimizer_step(size: int) -> None:
    model, factors = Model(), [1.0, 10.0, 100.0]
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # after this process has used its threads
    trainable = list(model.parameters())
    with distributed.forked(size, trainable, lambda g: model.keep_on(g, factors)) as group:
        for scale in (1, 2, 4):
            group.wait()
            assert model.step(group, factors) == scale * 8 * sum(factors[:size])
            assert model.weight.grad is not None
            assert model.weight.grad.tolist() == [[sum(factors[:size])] * 3] * 2
            with torch.no_grad():
                for parameter in trainable:
                    parameter.mul_(2)


def raises(error: Exception) -> Callable[[Group], None]:
    def work(group: Group) -> None:
        group.wait()
        raise error

    return work


def dies(group: Group) -> None:
    group.wait()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("work", "expected", "told"),
    [
        (raises(UserError("row 3 is wrong")), UserError, "^row 3 is wrong$"),
        (raises(KeyError("ours")), KeyError, "ours"),
        (dies, UserError, r"process \d+, a worker of the training, was ended from outside.*to 1"),
    ],
)
def test_what_ends_a_worker_is_raised_in_the_main_process(
    work: Callable[[Group], None], expected: type[Exception], told: str
) -> None:
    with (
        pytest.raises(expected, match=told),
        distributed.forked(2, [nn.Parameter(torch.ones(1))], work) as group,
    ):
        group.wait()
        group.wait()


def test_an_error_of_the_main_process_ends_its_workers() -> None:
    with (
        pytest.raises(RuntimeError, match="mine"),
        distributed.forked(2, [nn.Parameter(torch.ones(1))], Group.wait),
    ):
        raise RuntimeError("mine")


ENDS_AT_ONCE = """
import sys, time
import torch
from filelock import FileLock
from stages.train import distributed
def work(group):
    print(__import__("os").getpid(), flush=True)
    time.sleep(60)
FileLock(sys.argv[1]).acquire()
with distributed.forked(3, [torch.nn.Parameter(torch.ones(1))], work):
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, None], ids=["killed", "ended"])
def test_no_worker_outlives_its_training_and_its_locks(
    tmp_path: Path, how: signal.Signals | None
) -> None:
    training = subprocess.Popen(
        [sys.executable, "-c", ENDS_AT_ONCE, tmp_path / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert training.stdout is not None
    workers: list[int] = []
    while len(workers) < 2:
        line = training.stdout.readline().strip()
        workers += [int(line)] if line.isdigit() else []
    assert all(Path(f"/proc/{number}").exists() for number in workers)
    if how:
        training.send_signal(how)
    training.communicate()
    FileLock(tmp_path / "lock").acquire(timeout=5)
    for _ in range(50):
        if not any(_runs(number) for number in workers):
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {workers}")


def _runs(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_first_signal_is_the_one_that_is_told_of() -> None:
    """Ctrl-C reaches every process, and the launcher then sends SIGTERM too."""
    with Interruption() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.heard == signal.SIGINT
