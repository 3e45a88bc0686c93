"""Installation by pip, and unsupported systems."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_contract import ROOT, STAGES


def test_wheel_holds_every_file_of_the_stages(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="no setuptools here, and none is fetched")
    (tmp_path / "source").mkdir()
    for name in ("stages", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / "source" / name).symlink_to(ROOT / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}"]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(tmp_path / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("stages/")}
    files = {p for p in STAGES.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert packed == {p.relative_to(ROOT).as_posix() for p in files}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("platform.system = lambda: 'Darwin'", "this is Darwin x86_64 with Python 3."),
        ("platform.machine = lambda: 'aarch64'", "this is Linux aarch64 with Python 3."),
        ("sys.version_info = (3, 14, 0)", "; dvc-qlora runs on Linux x86-64 with Python 3.11 to"),
        ("sys.version_info = (3, 10, 9)", "; dvc-qlora runs on Linux x86-64 with Python 3.11 to"),
    ],
)
def test_other_system_is_told_in_one_line(change: str, line: str) -> None:
    script = f"import platform, runpy, sys; {change}; runpy.run_module('stages.train.__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False
    )
    [shown] = done.stderr.decode().splitlines()
    assert (done.returncode, shown.startswith("error: this is ")) == (1, True)
    assert line in shown
