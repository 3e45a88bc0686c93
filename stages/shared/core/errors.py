"""How a stage ends when its input is at fault: one line, a non-zero exit, no traceback."""

import errno
import signal
import sys
from collections.abc import Callable
from types import FrameType

FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Something that the user can put right.

    The message is one line that names the parameter, or the file and line; what was found; what
    was expected; and what to do.
    """


class Stopped(Exception):  # noqa: N818  (it is asked for, and no error)
    """A signal ended the work, and what was done is kept; the message says how to go on."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, signal)
        self.message, self.signal = message, signal


class _Terminated(BaseException):
    """SIGTERM; no `Exception`, so that nothing on its way takes it for a fault of its own."""


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main()`.

    A `UserError`, a missing file and a fault of the disk become one line on stderr and exit code 1;
    anything else is a bug of ours and keeps its traceback. SIGTERM, which would end Python on the
    spot, ends it as Ctrl-C does: what is half written is removed.
    """
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        main()
    except UserError as error:
        _exit_with(str(error))
    except FileNotFoundError as error:
        # What a stage reads, another writes; DVC sees to the order, a stage run by hand does not.
        missing = error.filename or error
        _exit_with(f"{missing}: not there; `dvc repro` runs the stages that write it, in order")
    except OSError as error:
        _exit_with(_of_the_disk(error))
    except Stopped as stopped:
        print(f"stopped: {stopped.message}", file=sys.stderr)
        sys.exit(128 + stopped.signal)  # as a shell reports a process that a signal ended
    except Exception as error:
        if not _is_of_a_full_disk(error):
            raise
        _exit_with(_of_the_disk(OSError(errno.ENOSPC, None)))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except _Terminated:
        print("stopped by SIGTERM", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def _of_the_disk(error: OSError) -> str:
    """A fault that names a file, or a full disk; raised again where it is neither."""
    if error.errno in FULL:
        where = error.filename or "the disk"
        return f"{where}: no room on the disk; free some space and run `dvc repro` again"
    if error.filename is None:
        raise error
    return f"{error.filename}: {error.strerror}; expected a place that can be read and written"


def _is_of_a_full_disk(error: BaseException | None) -> bool:
    """Whether a library raised it because of one: torch after it, safetensors in its own words."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or f"(os error {errno.ENOSPC})" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _exit_with(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
