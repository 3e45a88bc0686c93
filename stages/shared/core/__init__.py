"""What every stage needs; on Linux x86-64 with Python 3.11 to 3.13, and nowhere else."""

import platform
import sys

_PYTHON = platform.python_version()
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    sys.exit(
        f"error: this is {platform.system()} {platform.machine()}; dvc-qlora runs on Linux x86-64. "
        "Use such a machine, a container, or WSL 2."
    )
if not (3, 11) <= sys.version_info < (3, 14):
    sys.exit(f"error: this is Python {_PYTHON}; dvc-qlora runs on Python 3.11 to 3.13. Use one.")
