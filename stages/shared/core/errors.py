"""Errors as one line, `<key or file:line>: <what is wrong>. <What to do.>`, and an exit code."""

import errno
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from stages.shared.core.display import one_line

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDY = "Run `dvc repro`, which writes it again."
MEMORY_WORDS = (
    "(can't|cannot) allocate memory|out of memory|failed to map segment"
    "|could not create a primitive"  # oneDNN's
)


class UserError(Exception):
    """A mistake that the user can put right; its message is the line to print."""


@dataclass(eq=False)
class Stopped(Exception):  # noqa: N818  (it is asked for, and no error)
    """End of the work by a signal; what was done is kept, and the message says how to go on."""

    message: str
    signal: int


@dataclass(eq=False)
class Signalled(BaseException):
    """Arrival of a signal; no `Exception`, which a library might catch."""

    signal: int | None = None  # None where its handler has recorded it


def raise_signal(number: int, frame: FrameType | None) -> None:
    """Handle a signal: end what runs, as Ctrl-C does, so that nothing stays half written."""
    raise KeyboardInterrupt if number == signal.SIGINT else Signalled(number)


def require_regular(path: Path) -> Path:
    """Refuse a folder, a pipe or a device, which would be read for ever; a missing file passes."""
    if not path.exists() or path.is_file():
        return path
    what = "a folder" if path.is_dir() else "a pipe, a socket or a device"
    raise UserError(f"{path}: is {what}; expected a file. Remove or rename it.")


@contextmanager
def reading(path: Path | str, remedy: str = REMEDY) -> Iterator[None]:
    """Errors of a library that reads `path` (or its name) as a `UserError`.

    A missing file, a fault of the disk and a lack of memory are no damage: `report` explains them.
    """
    if isinstance(path, Path) and not path.is_dir():
        require_regular(path).open("rb").close()  # not every library says which file is missing
    try:
        yield
    except (UserError, KeyboardInterrupt, Signalled, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust is no `Exception`
        missing = isinstance(error, OSError) and error.errno is not None
        if missing or _is_of_a_full_disk(error) or lacks_memory(error):
            raise
        raise UserError(f"{path}: cannot be read ({_describe(error)}). {remedy}") from error


def report(error: BaseException, command: str) -> int:
    """Print one line for what ended a command; returns the exit code, 128 + n for a signal."""
    match error:
        case UserError():
            line, code = f"error: {error}", 1
        case Stopped():
            line, code = f"stopped: {error.message}", 128 + error.signal
        case KeyboardInterrupt() | Signalled():
            number = signal.Signals(getattr(error, "signal", None) or signal.SIGINT)
            line, code = f"stopped: by {number.name}", 128 + number
        case _:
            line, code = f"error: {_explain(error, command)}", 1
    gone = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
    if gone and any(isinstance(cause, BrokenPipeError) for cause in causes(error)):  # `| head`
        line, code = "stopped: by SIGPIPE", 128 + signal.SIGPIPE
    for stream in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    print(one_line(line), file=sys.stderr)
    return code


def _explain(error: BaseException, command: str) -> str:
    name = isinstance(error, OSError) and (error.filename2 or error.filename)
    if _is_of_a_full_disk(error):
        place = name or "the disk"
        return f"{place}: no room on the disk; free some space and run `dvc repro` again"
    if lacks_memory(error):
        advice = "Free some, raise its limit, or lower QLORA_MICRO_BATCH_TOKENS."
        return f"{command}: out of memory ({_describe(error)}). {advice}"
    if getattr(error, "errno", None) == errno.EMFILE:
        return f"{command}: too many open files. Raise their limit, `ulimit -n`."
    if name and isinstance(error, FileNotFoundError):
        return f"{name}: not there; `dvc repro` runs the stages that write it, in order"
    reason = str(error.strerror) if isinstance(error, OSError) and name else _describe(error)
    if name or re.search(r"\(os error \d+\)", reason):  # raised in Rust
        return f"{name or command}: {reason}; expected a place that can be read and written"
    return f"{command}: {_describe(error)}, {_log(error, command)}"


def _log(error: BaseException, command: str) -> str:
    """Write the traceback to a log; returns where the error was raised, and the log's path."""
    root = Path(os.environ.get("DVC_ROOT", "."))  # a temporary workspace of DVC is removed
    path = root / ".logs" / f"{command.removeprefix('stages.')}.log"
    frames = traceback.extract_tb(error.__traceback__)
    *_, frame = [f for f in frames if "/stages/" in f.filename] or frames
    line = f"in stages{frame.filename.rpartition('/stages')[2]}:{frame.lineno}. It is a bug, or a"
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), errors="replace")
        return f"{line} damaged input; {path} holds the traceback."
    return f"{line} damaged input."


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.120}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The chain of an error: itself, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_a_full_disk(error: BaseException) -> bool:
    in_rust = rf"\(os error ({'|'.join(map(str, FULL))})\)"
    return any(getattr(e, "errno", 0) in FULL or re.search(in_rust, str(e)) for e in causes(error))


def lacks_memory(error: BaseException) -> bool:
    """Whether memory lacked, in the words of Python, numpy, torch or the system."""
    return any(
        isinstance(cause, MemoryError)
        or getattr(cause, "errno", None) == errno.ENOMEM
        or re.search(MEMORY_WORDS, str(cause), re.IGNORECASE)
        for cause in causes(error)
    )


def _reader_is_gone(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream, 0)  # type: ignore[arg-type]
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, TypeError, ValueError):  # it has no descriptor
        return False


def report_unraisable(command: str) -> None:
    """Report exceptions of destructors and threads in one line instead of a traceback.

    A signal that was raised in one is sent again, unless its handler has recorded it.
    """

    def hook(raised: Any) -> None:
        match error := raised.exc_value:
            case KeyboardInterrupt() | Signalled(signal=int()):
                number = getattr(error, "signal", signal.SIGINT)
                threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            case Exception():
                line = f"warning: {command}: passed over {_describe(error)}, {_log(error, command)}"
                print(one_line(line), file=sys.stderr)

    sys.unraisablehook = threading.excepthook = hook
