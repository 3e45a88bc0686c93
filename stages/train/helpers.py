"""Forks of the training that compute parts of a step beside it, on a CPU: a core each.

Threads that share a product wait for each other at each of the thousands of a step, take from each
other's cache what the next one reads, and wait together while Python says what comes next. A fork
has the weights for nothing: they are the same pages. What is trained, and the gradients, lie in
memory that both see.
"""

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from stages.shared import heap
from stages.shared.core.errors import UserError
from stages.train.forked_memory import own_peak_bytes, shared_like

Work = Callable[..., torch.Tensor]


class Helpers:
    """While entered, there are as many processes as `workers`, this one among them.

    Forked at once, so enter it when the model is as it is trained. What is trained stays where it
    is put here: it may be changed in place, and not be replaced.

    Attributes:
        workers: how many compute, with this process.
        resident_limit: what each may have in memory, in bytes, before it gives freed pages back;
            None if nothing is predicted.
    """

    def __init__(
        self, model: nn.Module, workers: int, work: Work, predicted_bytes: int | None = None
    ) -> None:
        """Nothing is started yet.

        Args:
            model: in training mode while it is entered, as it is in the forks for ever.
            workers: how many compute, with this process; 1 starts none.
            work: adds gradients to the parameters' `grad`, and returns what is to be summed.
            predicted_bytes: the most memory that all should need together.
        """
        self.workers = workers
        self.resident_limit = predicted_bytes
        self._work = work
        self._model = model
        self._learning = [p for p in model.parameters() if p.requires_grad]
        self._helpers: list[_Helper] = []

    def __enter__(self) -> Self:
        if self.workers > 1:
            self._model.train()
            for parameter, shared in zip(self._learning, shared_like(self._learning), strict=True):
                parameter.data = shared.copy_(parameter.data)
            gc.collect()
            gc.freeze()  # looking for garbage writes to what is looked at: pages would be copied
            heap.trim()
            if self.resident_limit:  # what is resident now is there once for all
                once = min(heap.resident_bytes(), self.resident_limit)
                self.resident_limit = once + (self.resident_limit - once) // self.workers
            # A thread that has never started threads of OpenMP: a fork of one that has waits for
            # them for ever, as they are not forked with it.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(self._fork).result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for helper in self._helpers:
            helper.end()
        if self._helpers:
            gc.unfreeze()
        self._helpers.clear()

    def _fork(self) -> None:
        for index in range(1, self.workers):
            others = [helper.channel for helper in self._helpers]
            self._helpers.append(
                _Helper(index, others, self._learning, self._work, self.resident_limit)
            )

    @contextmanager
    def beside(self, parts: Sequence[tuple[Any, ...]], found: torch.Tensor) -> Iterator[None]:
        """Have a fork work on each part while the block runs; what comes of it is added up.

        Args:
            parts: arguments of `work`, at most one of each fork.
            found: what the forks return is added to it, and their gradients to the parameters'
                `grad`, in the order of the parts.

        Raises:
            UserError: raised by `work`, or a fork was ended from outside.
        """
        cores = torch.get_num_threads()
        threads, seed = max(1, cores // (1 + len(parts))), torch.initial_seed()
        busy = self._helpers[: len(parts)]
        for helper, part in zip(busy, parts, strict=True):
            helper.ask((threads, seed + helper.index, part))
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(cores)
        for helper in busy:
            found += torch.tensor(helper.answer(), dtype=found.dtype)
            for parameter, gradient in zip(self._learning, helper.gradients, strict=True):
                parameter.grad = (
                    gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
                )

    def peak_bytes(self) -> int:
        """The most memory that the forks held of their own, together."""
        for helper in self._helpers:
            helper.ask(None)
        return sum(helper.answer() for helper in self._helpers)


class _Helper:
    """One fork, as this process knows it."""

    def __init__(
        self,
        index: int,
        others: Sequence[Connection],
        learning: Sequence[nn.Parameter],
        work: Work,
        resident_limit: int | None,
    ) -> None:
        self.index = index
        self.gradients = shared_like(learning)
        self.channel, its = Pipe()
        self.process = os.fork()
        if self.process == 0:
            try:
                for end in (self.channel, *others):  # or its own would never be at its end
                    end.close()
                for parameter, gradient in zip(learning, self.gradients, strict=True):
                    parameter.grad = gradient
                _serve(its, partial(_found, self.gradients, work, resident_limit))
            finally:
                os._exit(0)  # what the training does at its end is not its fork's to do
        its.close()

    def end(self) -> None:
        """At once: it holds nothing."""
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        self.channel.close()

    def ask(self, question: Any) -> None:
        """Have it begin.

        Raises:
            UserError: it was ended from outside.
        """
        try:
            self.channel.send(question)
        except OSError:
            raise self._missed() from None

    def answer(self) -> Any:
        """What it has found.

        Raises:
            UserError: it was ended from outside.
        """
        try:
            answer = self.channel.recv()
        except (EOFError, OSError):
            raise self._missed() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _missed(self) -> UserError:
        return UserError(
            f"a helper of the training, process {self.process}, was ended from outside; expected "
            "it to live as long as the training; if the machine ran out of memory, lower "
            "QLORA_MICRO_BATCH_TOKENS or set QLORA_WORKERS to 1"
        )


def _serve(channel: Connection, find: Callable[..., Any]) -> None:
    """What a fork does: it computes what it is asked to, until nobody is left who could ask.

    Another thread computes, so that this one sees at once that the training was killed: a fork
    would hold the lock on its checkpoints until its part of the step was done.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the training hears them, and ends it
        signal.signal(number, signal.SIG_IGN)
    computing = ThreadPoolExecutor(1)
    while True:
        try:
            asked = channel.recv()
        except (EOFError, OSError):
            os._exit(0)
        computing.submit(_answer, channel, find, asked)


def _answer(channel: Connection, find: Callable[..., Any], asked: tuple[Any, ...] | None) -> None:
    try:
        channel.send(own_peak_bytes() if asked is None else find(*asked))
    except Exception as error:  # for the process that asked
        channel.send(error)


def _found(
    gradients: Sequence[torch.Tensor],
    work: Work,
    resident_limit: int | None,
    threads: int,
    seed: int,
    part: tuple[Any, ...],
) -> list[float]:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    for gradient in gradients:
        gradient.zero_()
    if resident_limit:
        heap.trim_above(resident_limit)
    return work(*part).tolist()
