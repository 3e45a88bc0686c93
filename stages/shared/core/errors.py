"""User errors, and how a command begins and ends: `--help`, one line, an exit code."""

import errno
import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from io import TextIOWrapper
from itertools import takewhile
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

from stages.shared.core import display

FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake that the user can put right.

    The message is one line: `<key or file:line>: <what is wrong>. <What to do.>`
    """


class Stopped(Exception):  # noqa: N818  (it is asked for, and no error)
    """A signal ended the work; what was done is kept, and the message says how to go on."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, signal)
        self.message, self.signal = message, signal


class _Terminated(BaseException):
    """SIGTERM; no `Exception`, which a library might catch."""


def run(
    main: Callable[..., None], add_options: Callable[[ArgumentParser], object] | None = None
) -> None:
    """Run the `main()` of a stage or a tool, whose module is the command.

    `--help` prints the module's docstring and its sections of params.yaml; unknown arguments are
    refused. Neither runs anything. A `UserError`, a missing file and a fault of the disk become one
    line on stderr and exit code 1; any other exception is a bug and keeps its traceback. SIGTERM
    ends the command as Ctrl-C does: what is half written is removed.

    Args:
        main: called with the parsed options where there are any to add, else with nothing.
        add_options: adds the command's arguments to a parser.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 ends no stage
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    if main.__module__ == "__main__":  # a test keeps its streams
        display.guard()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        options = _parse(sys.modules[main.__module__], add_options)
        main(*([options] if add_options else []))
        from stages.shared.core import integrity  # noqa: PLC0415  (imports this module)

        integrity.record()
    except UserError as error:
        _exit_with(str(error))
    except FileNotFoundError as error:
        missing = error.filename or error
        _exit_with(f"{missing}: not there; `dvc repro` runs the stages that write it, in order")
    except OSError as error:
        _exit_with(_of_the_disk(error))
    except Stopped as stopped:
        print(f"stopped: {display.one_line(stopped.message)}", file=sys.stderr)
        sys.exit(128 + stopped.signal)  # as a shell reports a process that a signal ended
    except Exception as error:
        if not _is_of_a_full_disk(error):
            raise
        _exit_with(_of_the_disk(OSError(errno.ENOSPC, None)))
    except KeyboardInterrupt:
        print("stopped: by SIGINT", file=sys.stderr)
        sys.exit(130)
    except _Terminated:
        print("stopped: by SIGTERM", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}. `{self.prog} --help` says what it takes.")


def _parse(
    module: ModuleType, add_options: Callable[[ArgumentParser], object] | None
) -> Namespace | None:
    """The command line; None where another module, a test for one, calls `run`."""
    if module.__name__ != "__main__":
        return None
    name = module.__spec__.name.removesuffix(".__main__") if module.__spec__ else "stages"
    schema = getattr(module, "Params", None)
    sections = [_section(name) for name in schema.model_fields] if schema else []
    parser = _Parser(
        prog=f"python -m {name}",
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


def _of_the_disk(error: OSError) -> str:
    """One line for a full disk or a file that cannot be used; raised again where it is neither."""
    if error.errno in FULL:
        where = error.filename or "the disk"
        return f"{where}: no room on the disk; free some space and run `dvc repro` again"
    if error.filename is None:
        raise error
    return f"{error.filename}: {error.strerror}; expected a place that can be read and written"


def _is_of_a_full_disk(error: BaseException | None) -> bool:
    """Whether a library's error has a full disk as its cause."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or f"(os error {errno.ENOSPC})" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _exit_with(message: str) -> None:
    print(f"error: {display.one_line(message)}", file=sys.stderr)
    sys.exit(1)
