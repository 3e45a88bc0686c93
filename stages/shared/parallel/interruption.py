"""Interruption: SIGTERM, Ctrl-C and SIGHUP, acted on where nothing is lost."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from stages.shared.core.errors import SIGNALS, Signalled, Stopped


class Interrupted(Signalled):
    """A signal came in work that can be repeated."""


class Interruption:
    """Context in which a first signal is recorded in `heard`; a second Ctrl-C stops at once."""

    heard: signal.Signals | None = None
    _repeatable = False

    def __enter__(self) -> Self:
        heard = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]  # as nohup does
        self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stopped(self, work: str, when: str) -> Stopped:
        """The exception that ends "training", "after step 25"."""
        heard = self.heard or signal.SIGTERM  # another process's, whose kind is not known
        return Stopped(f"{work} was ended by {heard.name} {when}", heard)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.heard is None:
            self.heard = signal.Signals(number)
            if self._repeatable:
                raise Interrupted
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Context of work that can be repeated: a signal ends it with `Interrupted`."""
        self._repeatable = True
        try:
            if self.heard is not None:
                raise Interrupted
            yield
        finally:
            self._repeatable = False
