"""How a command begins and ends: help, arguments, one line, an exit code."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError

from stages.shared.core import errors, files
from tests import workspace
from tests.test_contract import ROOT, STAGE_FOLDERS, declared, python_files, sections
from tests.workspace import Workspace

TOOLS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for file in python_files(ROOT / "stages/tools")
    if "__main__" in file.read_text()
)
COMMANDS = [*(f"stages.{folder}" for folder in STAGE_FOLDERS), *TOOLS]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace.make(tmp_path_factory.mktemp("commands") / "space")


def contents(space: Workspace) -> set[Path]:
    return {p for p in space.root.rglob("*") if ".git" not in p.parts}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_unknown_arguments_run_nothing(space: Workspace, command: str) -> None:
    before = contents(space)
    shown = space.run(sys.executable, "-m", command, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    refused = space.run(sys.executable, "-m", command, "--no-such", "x")
    assert refused.returncode == 1
    [line] = refused.stderr.splitlines()
    assert line.startswith(f"error: python -m {command}: ")
    assert contents(space) == before
    if command not in TOOLS:
        stage = next(body for name, body in declared().items() if command[7:] == name.split("@")[0])
        assert "Reads:" in shown.stdout and "Writes:" in shown.stdout
        values = yaml.safe_load((space.root / "params.yaml").read_text())
        for section in sections(stage):
            assert f"\n{section}:" in shown.stdout
            assert all(f"\n  {key}:" in shown.stdout for key in values[section])


def test_what_a_terminal_cannot_show_is_replaced(space: Workspace) -> None:
    script = r"""
from stages.shared.core import progress
from stages.shared.core.errors import UserError, run
def main():
    with progress.bar(total=2, desc="\u2192 caf\u00e9", unit="row") as bar:
        bar.update()
    print("loss 1 \u2192 2, \udcff")
    raise UserError("\u65e5\u672c.jsonl: not there")
run(main)
"""
    environments: tuple[dict[str, str], ...] = (
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {},
    )
    for environment in environments:
        done = space.run(sys.executable, "-c", script, env=environment)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert done.stdout.startswith("loss 1 ")
        assert "jsonl: not there" in done.stderr


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "models/adapter")

    with pytest.raises(SystemExit) as stop:
        errors.run(write)
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "error: models/adapter: no room on the disk; free some space and run `dvc repro` again\n"
    )


def _torch_save() -> None:
    with Path("/dev/full").open("wb") as file:
        torch.save({"weights": torch.zeros(1 << 20)}, file)


def _save_file() -> None:
    """As safetensors says it; it puts a new file in the place of any device."""
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is full")
@pytest.mark.parametrize("write", [_torch_save, _save_file])
def test_a_disk_that_fills_up_under_tensors_is_one_line(
    write: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        errors.run(write)
    assert stop.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "no room on the disk; free some space" in line


def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")

    def write() -> None:
        (tmp_path / "file" / "a").write_text("x")

    with pytest.raises(SystemExit):
        errors.run(write)
    [line] = capsys.readouterr().err.splitlines()
    assert "file/a: Not a directory; expected a place" in line


def test_sigterm_removes_what_is_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        with files.whole_folder(tmp_path / "out") as partial:
            (partial / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        errors.run(write)
    assert stop.value.code == 143
    assert capsys.readouterr().err == "stopped: by SIGTERM\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_bug_is_one_line_and_its_traceback_is_kept(space: Workspace) -> None:
    script = "from stages.shared.core.errors import run\ndef main():\n    {}['ours']\nrun(main)"
    done = space.run(sys.executable, "-c", script)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "KeyError: 'ours'" in line and ".logs/__main__.log holds the traceback" in line
    assert "Traceback" in (space.root / ".logs/__main__.log").read_text()
    assert space.run("git", "check-ignore", "--quiet", ".logs/__main__.log").returncode == 0


ENDS = """
import os, signal, sys, threading, time
from stages.shared.core.errors import Signalled, run
class D:
    def __init__(self, does):
        self.does = does
    def __del__(self):
        self.does()
class Panic(BaseException):
    pass
def interrupt():
    raise Signalled
def main():
    print("begun", flush=True)
    {}
run(main)
"""


@pytest.mark.parametrize(
    ("does", "code", "told"),
    [
        ("bytearray(1 << 60)", 1, "error: __main__: out of memory (MemoryError"),
        ("import torch; torch.empty(1 << 60)", 1, "error: __main__: out of memory (RuntimeError"),
        ("raise Panic", 1, "error: __main__: Panic: , in "),
        ("D(interrupt); 1 / 0", 1, "error: __main__: ZeroDivisionError"),
        ("D(lambda: 1 / 0)", 0, "warning: __main__: passed over ZeroDivisionError"),
        (
            "threading.Thread(target=lambda: 1 / 0).start()",
            0,
            "warning: __main__: passed over Zero",
        ),
        ("os.kill(os.getpid(), signal.SIGHUP)", 129, "stopped: by SIGHUP"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "stopped: by SIGINT"),
        ("D(lambda: os.kill(os.getpid(), signal.SIGTERM)); time.sleep(60)", 143, "stopped: by SIG"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, "error: __main__: ended without a word"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -11, "error: __main__: ended without a word"),
    ],
)
def test_every_end_is_told_in_one_line(space: Workspace, does: str, code: int, told: str) -> None:
    bar = "print('bar', end='', file=sys.stderr, flush=True)" if code < 0 else "None"
    done = space.run(sys.executable, "-c", ENDS.replace("{}", f"{bar}; {does}"))
    assert done.returncode == code, done.stderr
    *_, line = done.stderr.splitlines()
    assert len(done.stderr.splitlines()) == (2 if code < 0 else 1)
    assert line.startswith(told)


@pytest.mark.parametrize(
    ("does", "code", "told"),
    [
        ("import os; os.kill(os.getpid(), 15)", 143, "stopped: by SIGTERM"),
        ("import os; os.kill(os.getpid(), 2)", 130, "stopped: by SIGINT"),
        ("import no_such_package", 1, "error: the command cannot start (ModuleNotFoundError: No m"),
    ],
)
def test_an_end_before_it_begins_is_one_line(
    space: Workspace, does: str, code: int, told: str
) -> None:
    (space.root / "stages/early").mkdir(exist_ok=True)
    (space.root / "stages/early/__main__.py").write_text(
        f"{does}\nfrom stages.shared.core.errors import run\nrun(lambda: None)\n"
    )
    done = space.stage("early")
    assert done.returncode == code
    [line] = done.stderr.splitlines()
    assert line.startswith(told)


def test_a_closed_terminal_ends_no_command(space: Workspace) -> None:
    command = f"{sys.executable} -c '{ENDS.replace('{}', 'print(1, file=sys.stderr)')}' >&- 2>&-"
    assert space.run("bash", "-c", command).returncode == 0


def test_a_reader_that_is_gone_is_a_signal(space: Workspace) -> None:
    does = "time.sleep(1); [print(i) for i in range(9999)]"
    command = (
        f"{sys.executable} -c '{ENDS.replace('{}', does)}' | head -n 1; echo ${{PIPESTATUS[0]}}"
    )
    done = space.run("bash", "-c", command)
    assert done.stdout.split() == ["begun", "141"]
    assert done.stderr == "stopped: by SIGPIPE\n"


def test_a_child_that_is_stopped_is_not_waited_for(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watcher kills it; whoever started it finds its child ended."""
    does = (
        "import subprocess; child = subprocess.Popen(['sleep', '1000']); "
        "child.send_signal(signal.SIGSTOP); print(child.wait())"
    )
    fast = "from stages.shared.core import watcher; watcher.INTERVAL = 0.1"
    done = space.run(sys.executable, "-c", fast + ENDS.replace("{}", does))
    assert (done.returncode, done.stdout) == (0, "begun\n-9\n")


def test_reading_names_the_file_and_passes_what_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError), errors.reading(path):
        pass
    path.write_text("[1]")
    with pytest.raises(errors.UserError, match=r"a\.json: cannot be .*list instead of an object"):
        files.read_json(path)
    with pytest.raises(MemoryError), errors.reading(path):
        raise MemoryError


@pytest.mark.parametrize("kind", ["folder", "file", "pipe"])
def test_what_lies_where_a_stage_writes_is_replaced(tmp_path: Path, kind: str) -> None:
    """`shutil.rmtree` would wait for a writer of the pipe."""
    for name in ("out", "out.partial"):
        {"folder": os.mkdir, "file": os.mknod, "pipe": os.mkfifo}[kind](tmp_path / name)
    with files.whole_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("x")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "a"]
