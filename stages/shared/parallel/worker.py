"""Worker: a process that the launcher starts, for one device.

Run:    by torch's elastic agent, `python -m stages.shared.parallel.worker <folder> <launcher>`
"""

import os
import pickle
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from stages.shared.core import display
from stages.shared.core.errors import SIGNALS, Stopped, UserError, report_unraisable
from stages.shared.parallel.group import LOST, PeerLost, member


def main() -> None:
    """Run the folder's pickled job, and leave its pickled result or error there."""
    folder, launcher = Path(sys.argv[1]), int(sys.argv[2])
    display.guard()
    report_unraisable("stages.train")
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != launcher:  # it has ended before
        os._exit(1)
    # Blocked until here. Training handles them; whatever has nothing to save just ends.
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    (folder / f"{os.getpid()}.started").touch()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        device_type, work, args = pickle.loads((folder / "job").read_bytes())  # noqa: S301
        with member(device_type, launched=True) as (group, device):
            result = work(group, device, *args)
            if group.is_main:
                _leave(folder, "result", result)
    except Stopped as stopped:
        _leave(folder, "result", stopped)
    except PeerLost:
        sys.exit(LOST)
    except Exception as error:
        if not isinstance(error, UserError):
            error.add_note(traceback.format_exc())
        _leave(folder, f"{os.getpid()}.error", error)
        sys.exit(1)


def _leave(folder: Path, name: str, value: Any) -> None:
    partial = folder / f"{os.getpid()}.partial"
    partial.write_bytes(pickle.dumps(value))
    partial.rename(folder / name)


if __name__ == "__main__":
    main()
