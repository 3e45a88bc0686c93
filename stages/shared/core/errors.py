"""User errors, and how a command begins and ends: `--help`, one line, an exit code."""

import errno
import os
import re
import select
import signal
import sys
import threading
import traceback
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from io import TextIOWrapper
from itertools import takewhile
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn, TextIO

from stages.shared.core import display
from stages.shared.core.watcher import SIGNALS, watched

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOGS = ".logs"
REMEDY = "Run `dvc repro`, which writes it again."
MEMORY_WORDS = (
    "(can't|cannot) allocate memory|out of memory|failed to map segment"
    "|could not create a primitive"  # oneDNN's
)
MEMORY = "Free some, raise its limit, or lower QLORA_MICRO_BATCH_TOKENS."


class UserError(Exception):
    """A mistake that the user can put right.

    The message is one line: `<key or file:line>: <what is wrong>. <What to do.>`
    """


class Stopped(Exception):  # noqa: N818  (it is asked for, and no error)
    """A signal ended the work; what was done is kept, and the message says how to go on."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, signal)
        self.message, self.signal = message, signal


class Signalled(BaseException):
    """A signal came; no `Exception`, which a library might catch."""


class _Ended(Signalled):
    """SIGTERM or SIGHUP ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


def run(
    main: Callable[..., None], add_options: Callable[[ArgumentParser], object] | None = None
) -> None:
    """Run the `main()` of a stage or a tool, whose module is the command.

    `--help` prints the module's docstring and its sections of params.yaml; unknown arguments are
    refused. Neither runs anything. Whatever ends the command is one line on stderr and an exit
    code: 1, or 128 and the number of a signal. Of an error that nobody foresaw, the traceback is
    kept in `.logs/`. A signal ends the command as Ctrl-C does: what is half written is removed.

    Args:
        main: called with the parsed options where there are any to add, else with nothing.
        add_options: adds the command's arguments to a parser.
    """
    is_command = main.__module__ == "__main__"  # a test keeps its streams and signals
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 ends no stage
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    module = sys.modules[main.__module__]
    command = module.__spec__.name.removesuffix(".__main__") if module.__spec__ else module.__name__
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]  # as nohup does
    try:
        for number in heard:
            signal.signal(number, _stop)
        if is_command:
            display.guard()
            tell_of_asides(command)
            sys.excepthook = lambda _, error, trace: _say(_ending(error, command)[0])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by `stages`
        options = _parse(module, command, add_options)
        with watched(command) if is_command else nullcontext():
            main(*([options] if add_options else []))
            from stages.shared.core import integrity  # noqa: PLC0415  (imports this module)

            integrity.record()
            sys.stdout.flush()  # or Python would find its reader gone when all is over
    except SystemExit:
        raise
    except BaseException as error:  # a panic of Rust is no `Exception`
        for number in heard:  # a second one comes too late
            signal.signal(number, signal.SIG_IGN)
        line, code = _ending(error, command)
        for stream in (sys.stdout, sys.stderr):
            if _reader_is_gone(stream):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        _say(line)
        sys.exit(code)
    finally:
        for number in heard:  # of a command, all is over; Python's own end would print a traceback
            signal.signal(number, signal.SIG_IGN if is_command else before[number])


def _say(line: str) -> None:
    print(display.one_line(line), file=sys.stderr)


@contextmanager
def reading(path: Path | str, remedy: str = REMEDY) -> Iterator[None]:
    """Turn any error of a library that reads `path` (or its name) into a `UserError` with its name.

    A missing file, a fault of the disk and a lack of memory are no damage: `run` tells of them.
    """
    if isinstance(path, Path) and not path.is_dir():
        path.open("rb").close()  # not every library says which file is missing
    try:
        yield
    except (UserError, KeyboardInterrupt, Signalled, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust is no `Exception`
        missing = isinstance(error, OSError) and error.errno is not None
        if missing or _is_of_a_full_disk(error) or lacks_memory(error):
            raise
        raise UserError(f"{path}: cannot be read ({_describe(error)}). {remedy}") from error


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}. `{self.prog} --help` says what it takes.")


def _parse(
    module: ModuleType, command: str, add_options: Callable[[ArgumentParser], object] | None
) -> Namespace | None:
    """The command line; None where another module, a test for one, calls `run`."""
    if module.__name__ != "__main__":
        return None
    schema = getattr(module, "Params", None)
    sections = [_section(name) for name in schema.model_fields] if schema else []
    parser = _Parser(
        prog=f"python -m {command}",
        description=(module.__doc__ or "").strip(),
        epilog="\n\n".join(["parameters, in params.yaml:", *sections] if sections else []),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if add_options:
        add_options(parser)
    return parser.parse_args()


def _section(name: str) -> str:
    """A section of params.yaml as it stands there, its comments included."""
    path = Path("params.yaml")
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    )
    starts = [i for i, line in enumerate(lines) if line.startswith(f"{name}:")]
    if not starts:
        return f"{name}:"
    body = takewhile(lambda line: line.startswith(" "), lines[starts[0] + 1 :])
    return "\n".join([lines[starts[0]], *body])


def _ending(error: BaseException, command: str) -> tuple[str, int]:
    """The line that tells of an error or a signal, and the exit code, a shell's for a signal."""
    match error:
        case UserError():
            return f"error: {error}", 1
        case Stopped():
            return f"stopped: {error.message}", 128 + error.signal
        case KeyboardInterrupt():
            return "stopped: by SIGINT", 128 + signal.SIGINT
        case _Ended():
            return f"stopped: by {error.signal.name}", 128 + error.signal
    broken = any(isinstance(cause, BrokenPipeError) for cause in _causes(error))
    if broken and any(map(_reader_is_gone, (sys.stdout, sys.stderr))):  # `| head`
        return "stopped: by SIGPIPE", 128 + signal.SIGPIPE
    return f"error: {_explain(error, command)}", 1


def _explain(error: BaseException, command: str) -> str:
    """One line: the place, the fault, the remedy."""
    name = isinstance(error, OSError) and (error.filename2 or error.filename)
    if _is_of_a_full_disk(error):
        return (
            f"{name or 'the disk'}: no room on the disk; free some space and run `dvc repro` again"
        )
    if lacks_memory(error):
        return f"{command}: out of memory ({_describe(error)}). {MEMORY}"
    if getattr(error, "errno", None) == errno.EMFILE:
        return f"{command}: too many open files. Raise their limit, `ulimit -n`."
    if name and isinstance(error, FileNotFoundError):
        return f"{name}: not there; `dvc repro` runs the stages that write it, in order"
    if name and isinstance(error, OSError):
        return f"{name}: {error.strerror}; expected a place that can be read and written"
    return f"{command}: {_describe(error)}, {_log(error, command)}"


def _log(error: BaseException, command: str) -> str:
    """Keep the traceback; returns where the error was raised, and where its traceback is."""
    root = Path(os.environ.get("DVC_ROOT", "."))  # a temporary workspace of DVC is removed
    frames = traceback.extract_tb(error.__traceback__)
    *_, frame = [f for f in frames if "/stages/" in f.filename] or frames
    where = f"in {'stages' + frame.filename.rpartition('/stages')[2]}:{frame.lineno}"
    path = root / LOGS / f"{command.removeprefix('stages.')}.log"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), errors="replace")
    except OSError:
        return f"{where}. It is a bug, or a damaged input."
    return f"{where}. It is a bug, or a damaged input; {path} holds the traceback."


def _describe(error: BaseException) -> str:
    """An error's type and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.120}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised for."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_a_full_disk(error: BaseException) -> bool:
    """Whether an error, of a library too, has a full disk as its cause."""
    return any(
        getattr(cause, "errno", None) in FULL or f"(os error {errno.ENOSPC})" in str(cause)
        for cause in _causes(error)
    )


def lacks_memory(error: BaseException) -> bool:
    """Whether memory lacked, in the words of Python, numpy, torch or the system."""
    return any(
        isinstance(cause, MemoryError)
        or getattr(cause, "errno", None) == errno.ENOMEM
        or re.search(MEMORY_WORDS, str(cause), re.IGNORECASE)
        for cause in _causes(error)
    )


def _reader_is_gone(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream, 0)  # type: ignore[arg-type]
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, TypeError, ValueError):  # it has no descriptor
        return False


def tell_of_asides(command: str) -> None:
    """Tell in one line of an error of a `__del__` or a thread, which Python prints whole."""
    sys.unraisablehook = lambda ignored: _pass_over(ignored.exc_value, command)
    threading.excepthook = lambda ended: _pass_over(ended.exc_value, command)


def _pass_over(error: BaseException | None, command: str) -> None:
    """Tell of an error; send a signal once more, unless its handler has noted it."""
    match error:
        case KeyboardInterrupt() | _Ended():
            number = getattr(error, "signal", signal.SIGINT)
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        case Exception():
            _say(f"warning: {command}: passed over {_describe(error)}, {_log(error, command)}")


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else _Ended(number)
