"""Forks that compute parts of a step: what they see, what they leave, and how they end."""

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

from stages.shared import heap
from stages.shared.core.errors import UserError
from stages.train.helpers import Helpers

MIB = 2**20


def work(model: nn.Module) -> Callable[[float], torch.Tensor]:
    """The gradient of the sum of the weights times a factor; what is summed is that sum."""

    def compute(factor: float) -> torch.Tensor:
        loss = torch.stack([p.sum() for p in model.parameters()]).sum() * factor
        loss.backward()
        return torch.stack([loss.detach().double(), torch.rand(()).double()])

    return compute


def linear() -> nn.Linear:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    return model


def step(helpers: Helpers, model: nn.Module, *factors: float) -> torch.Tensor:
    """This process takes the first factor, helpers the others."""
    found = torch.zeros(2, dtype=torch.float64)
    with helpers.beside([(factor,) for factor in factors[1:]], found):
        found += helpers._work(factors[0])
    return found


def test_gradients_and_what_is_returned_are_summed() -> None:
    model = linear()
    with Helpers(model, 3, work(model)) as helpers:
        assert step(helpers, model, 1, 10, 100)[0] == 8 * 111
        assert model.weight.grad is not None
        assert model.weight.grad.tolist() == [[111.0] * 3] * 2
        model.zero_grad()
        assert step(helpers, model, 1, 20)[0] == 8 * 21  # one of them has nothing to do
        assert model.weight.grad.tolist() == [[21.0] * 3] * 2


def test_a_helper_sees_what_the_optimizer_did() -> None:
    model = linear()
    with Helpers(model, 2, work(model)) as helpers:
        with torch.no_grad():
            model.weight.mul_(2)
        assert step(helpers, model, 0, 1)[0] == 2 * 6 + 2


def test_what_is_random_follows_the_seed_of_the_step_and_differs_among_helpers() -> None:
    model = linear()
    drawn = []
    with Helpers(model, 2, work(model)) as helpers:
        for seed in (5, 5, 6):
            found = torch.zeros(2, dtype=torch.float64)
            torch.manual_seed(seed)
            with helpers.beside([(1.0,)], found):
                pass
            drawn.append(found[1].item())
    torch.manual_seed(5)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != torch.rand(()).item()


def test_the_cores_are_shared_while_helpers_compute() -> None:
    """With two threads in each, after this process has used its own: a fork of those would hang."""
    before = torch.get_num_threads()
    square = torch.rand(512, 512)
    model = linear()

    def threads() -> torch.Tensor:
        return torch.tensor([torch.get_num_threads(), float(torch.mm(square, square).sum() > 0)])

    torch.set_num_threads(4)
    try:
        torch.mm(square, square)
        with Helpers(model, 2, threads) as helpers:
            found = torch.zeros(2)
            with helpers.beside([()], found):
                assert torch.get_num_threads() == 2
            assert found.tolist() == [2, 1]
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_an_error_of_a_helper_is_raised_here() -> None:
    def fail() -> torch.Tensor:
        raise UserError("row 3 is wrong")

    with (
        Helpers(linear(), 2, fail) as helpers,
        pytest.raises(UserError, match="row 3 is wrong"),
        helpers.beside([()], torch.zeros(1)),
    ):
        pass


@pytest.mark.parametrize("before", [False, True], ids=["while it computes", "between two steps"])
def test_a_helper_that_was_killed_ends_in_one_line(before: bool) -> None:
    def die() -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1)

    with Helpers(linear(), 2, die) as helpers:
        if before:
            os.kill(helpers._helpers[0].process, signal.SIGKILL)
            time.sleep(0.5)
        with pytest.raises(UserError) as error, helpers.beside([()], torch.zeros(1)):
            pass
    line = str(error.value)
    assert line.startswith("a helper of the training, process ")
    assert "QLORA_WORKERS to 1" in line
    assert "\n" not in line


def test_memory_of_helpers_is_counted_and_what_they_share_is_not() -> None:
    held = torch.ones(64 * MIB, dtype=torch.uint8)

    def take() -> torch.Tensor:
        return torch.ones(96 * MIB, dtype=torch.uint8)[:1].double() + held[0]

    with Helpers(linear(), 2, take) as helpers:
        before = helpers.peak_bytes()
        assert before < 48 * MIB
        with helpers.beside([()], torch.zeros(1, dtype=torch.float64)):
            pass
        assert 96 * MIB <= helpers.peak_bytes() < before + 112 * MIB


def test_what_is_resident_before_they_fork_is_shared_and_the_rest_divided() -> None:
    predicted = 2 * heap.resident_bytes()
    with Helpers(linear(), 4, lambda: torch.zeros(1), predicted) as helpers:
        assert helpers.resident_limit
        assert 0.25 * predicted < helpers.resident_limit < 0.7 * predicted  # a trim comes first
    assert Helpers(linear(), 1, lambda: torch.zeros(1), predicted).resident_limit == predicted


def test_one_worker_alone_forks_nothing() -> None:
    model = linear()
    weights = model.weight.data_ptr()
    with Helpers(model, 1, work(model)) as helpers:
        assert helpers._helpers == []
        assert model.weight.data_ptr() == weights
        assert helpers.peak_bytes() == 0


ENDS_AT_ONCE = """
import sys, time
import torch
from filelock import FileLock
from stages.train.helpers import Helpers
FileLock(sys.argv[1]).acquire()
helpers = Helpers(torch.nn.Linear(2, 2), 3, lambda: time.sleep(60)).__enter__()
helpers._helpers[0].ask((1, 0, ()))  # one of them computes, the other waits
time.sleep(0.5)
print(*[helper.process for helper in helpers._helpers], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, None], ids=["killed", "ended"])
def test_no_helper_outlives_its_training_and_its_locks(
    tmp_path: Path, how: signal.Signals | None
) -> None:
    training = subprocess.Popen(
        [sys.executable, "-c", ENDS_AT_ONCE, tmp_path / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert training.stdout is not None
    helpers = [int(number) for number in training.stdout.readline().split()]
    assert len(helpers) == 2
    assert all(Path(f"/proc/{number}").exists() for number in helpers)
    if how:
        training.send_signal(how)
    training.communicate()
    FileLock(tmp_path / "lock").acquire(timeout=5)
    for _ in range(50):
        if not any(_runs(number) for number in helpers):
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {helpers}")


def _runs(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
