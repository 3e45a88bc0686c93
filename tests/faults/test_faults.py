"""A short sweep of seeded faults; `make faults` is the long one."""

import json
import subprocess
import sys

from tests.workspace import ROOT


def test_a_sweep_of_faults_ends_as_it_should() -> None:
    """One in each stage: damage to files, signals, limits of memory and odd parameters."""
    command = [sys.executable, "-m", "tests.faults.injector", "--tries", "13", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"tries": 13, "right": 13}
