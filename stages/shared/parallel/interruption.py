"""SIGTERM, Ctrl-C and SIGHUP, acted on where nothing is lost."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from stages.shared.core.errors import Stopped
from stages.shared.core.watcher import SIGNALS

SET_UP = "while it was set up; `dvc repro` begins where it began"


def heard() -> list[signal.Signals]:
    """The signals that end a training, without those that are ignored, as nohup does SIGHUP."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


class Interrupted(BaseException):
    """A signal came in a computation that can be repeated."""


class Interruption:
    """While entered, a first signal is noted in `heard`; a second Ctrl-C stops at once.

    Not in one of several devices: it hears Ctrl-C from the terminal and again from the launcher,
    and the launcher ends all of them at a second one.
    """

    heard: signal.Signals | None = None
    _repeatable = False

    def __init__(self, *, among_devices: bool = False) -> None:
        self._among_devices = among_devices

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in heard()}
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see distributed.launch
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stopped(self, when: str) -> Stopped:
        """The exception that ends a training, "after step 25"."""
        heard = self.heard or signal.SIGTERM  # another process's, whose kind is not known
        return Stopped(f"training was ended by {heard.name} {when}", heard)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.heard is None:
            self.heard = signal.Signals(number)
            if self._repeatable:
                raise Interrupted
        elif number == signal.SIGINT and not self._among_devices:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Around work that changes nothing that is kept: a signal ends it with `Interrupted`."""
        self._repeatable = True
        try:
            if self.heard is not None:
                raise Interrupted
            yield
        finally:
            self._repeatable = False
