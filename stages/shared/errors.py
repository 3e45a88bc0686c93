"""How a stage ends when its input is at fault: one line, a non-zero exit, no traceback."""

import errno
import sys
from collections.abc import Callable


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


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main()`.

    A `UserError`, a missing file and a full disk become one line on stderr and exit code 1;
    anything else is a bug of ours and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        _exit_with(str(error))
    except FileNotFoundError as error:
        # What a stage reads, another writes; DVC sees to the order, a stage run by hand does not.
        missing = error.filename or error
        _exit_with(f"{missing}: not there; `dvc repro` runs the stages that write it, in order")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "the disk"
        _exit_with(f"{where}: no room on the disk; free some space and run `dvc repro` again")
    except Stopped as stopped:
        print(f"stopped: {stopped.message}", file=sys.stderr)
        sys.exit(128 + stopped.signal)  # as a shell reports a process that a signal ended
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _exit_with(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
