"""One process a device: how many there are, what they add up, and how they are started.

A step's micro-batches are divided among the processes; their losses and gradients are summed.
Every process holds the whole model, and the same weights after each step.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from torch.multiprocessing import ProcessExitedException

from stages.shared.core.errors import Stopped, UserError
from stages.train.interruption import Interruption


@dataclass(frozen=True)
class Processes:
    """This process among all that train together; `Processes()` trains alone."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and shows."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Which items of a list are this process's."""
        return slice(self.rank, None, self.size)

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it is so in any of the processes."""
        if self.size == 1:
            return here
        votes = torch.tensor(float(here), device=device)
        self.add_up([votes])
        return votes.item() > 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()


def run(size: int, device: torch.device, work: Callable[..., Any], *args: Any) -> Any:
    """Call `work(processes, device, *args)` in `size` processes; returns what the first returns.

    Args:
        size: one process runs in this one, without any machinery.
        device: cpu, or cuda: then each process has the device of its rank.
        work: a function at the top level of a module; what it returns can be pickled and holds no
            tensor, whose memory would go with its process.
        args: more arguments for `work`.

    Raises:
        UserError: raised by `work` in any process, or one was ended from outside.
        Stopped: raised by `work` in any process, or a signal came before it began.
    """
    if size == 1:
        return work(Processes(), device, *args)
    with tempfile.TemporaryDirectory() as meeting:
        context = multiprocessing.get_context("spawn")
        answers = context.SimpleQueue()
        started = multiprocessing.start_processes(
            _one,
            (size, device.type, Path(meeting) / "store", answers, work, args),
            size,
            join=False,
        )
        try:
            with Interruption() as stop:
                while answers.empty() and not started.join(timeout=0.2):
                    if stop.heard:  # sent to this process alone, or to all: the second is ignored
                        _terminate(started.processes)
                answer = answers.get()
        except ProcessExitedException as ended:
            if stop.heard:
                raise Stopped("training was ended before its first step", stop.heard) from None
            how = ended.signal_name or f"exit code {ended.exit_code}"
            raise UserError(
                f"process {ended.error_pid}, one of {size} that train together, was ended from "
                f"outside ({how}); expected all to live as long as the training; run it again, and "
                "if the machine ran out of memory, lower QLORA_MICRO_BATCH_TOKENS or QLORA_DEVICES"
            ) from None
        finally:
            _terminate(started.processes)
    if isinstance(answer, UserError | Stopped):
        raise answer
    return answer


def _terminate(processes: Iterable[Any]) -> None:
    for process in processes:
        process.terminate()


def _one(
    rank: int,
    size: int,
    device_type: str,
    store: Path,
    answers: Any,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """What each process does."""
    if rank > 0:  # one progress bar, one warning; what goes wrong reaches the parent another way
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:  # the processes share the cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=store.as_uri(),
        rank=rank,
        world_size=size,
    )
    try:
        answer = work(Processes(rank, size), device, *args)
        if rank == 0:
            answers.put(answer)
    except (UserError, Stopped) as error:
        answers.put(error)
    finally:
        distributed.destroy_process_group()
