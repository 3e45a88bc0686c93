"""What happens to processes that train together when one of them, or all of them, are ended."""

import os
import signal

import pytest
import torch

from stages.shared.core.errors import UserError
from stages.train import processes
from stages.train.interruption import Interruption
from stages.train.processes import Processes


def killed(among: Processes, device: torch.device) -> None:
    """One is ended as the kernel does where memory runs out; the other waits for it."""
    if among.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    among.wait()


def test_one_that_is_killed_ends_the_training_in_one_line() -> None:
    with pytest.raises(UserError, match=r"one of 2 .* from outside \(SIGKILL\)") as error:
        processes.run(2, torch.device("cpu"), killed)
    assert "\n" not in str(error.value)


def test_the_first_signal_is_the_one_that_is_told_of() -> None:
    """Ctrl-C reaches every process, and what starts them then sends SIGTERM too."""
    with Interruption() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.heard == signal.SIGINT
