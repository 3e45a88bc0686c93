"""The stages and tools of the pipeline, each a command: `python -m stages.<name>`."""

import platform
import signal
import sys

_here = f"{platform.system()} {platform.machine()}"
if _here != "Linux x86_64" or not (3, 11) <= sys.version_info < (3, 14):
    sys.exit(
        f"error: this is {_here} with Python {platform.python_version()}; dvc-qlora runs on Linux "
        "x86-64 with Python 3.11 to 3.13. Use those, a container, or WSL 2."
    )


def _report(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Report in one line an error before `command.run`: a missing package, or lack of memory."""
    reason = " ".join(f"{kind.__name__}: {error}".split())
    advice = "Activate the environment (. .venv/bin/activate), or free memory."
    print(f"error: the command cannot start ({reason:.200}). {advice}", file=sys.stderr)


if sys.argv[:1] == ["-m"]:  # Python is locating the command, and has imported nothing else
    sys.excepthook = _report
    # `command.run` unblocks them. A library interrupted amid its import reports a missing module.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
