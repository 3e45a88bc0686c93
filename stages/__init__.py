"""The stages and tools of the pipeline, each a command: `python -m stages.<name>`.

On Linux x86-64 with Python 3.11 to 3.13, and nowhere else.
"""

import platform
import signal
import sys

if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    sys.exit(
        f"error: this is {platform.system()} {platform.machine()}; dvc-qlora runs on Linux x86-64. "
        "Use such a machine, a container, or WSL 2."
    )
if not (3, 11) <= sys.version_info < (3, 14):
    python = platform.python_version()
    sys.exit(f"error: this is Python {python}; dvc-qlora runs on Python 3.11 to 3.13. Use one.")


def _tell(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Tell in one line what ends a command before `errors.run` can: a package or memory lacks."""
    reason = " ".join(f"{kind.__name__}: {error}".split())
    advice = "Activate the environment (. .venv/bin/activate), or free memory."
    print(f"error: the command cannot start ({reason:.200}). {advice}", file=sys.stderr)


if sys.argv[:1] == ["-m"]:  # Python is locating the command, and has imported nothing else
    sys.excepthook = _tell
    # `errors.run` lets them in. Half imported, a library would say that it lacks a module.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
