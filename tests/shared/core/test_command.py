"""How a command begins and ends: help, arguments, one line, an exit code."""

import gc
import shlex
import sys

import pytest
import yaml

from stages.shared.core.command import quick_imports
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_unknown_arguments_run_nothing(space: Workspace, command: str) -> None:
    def contents() -> set[str]:
        return {str(p) for p in space.root.rglob("*") if ".git" not in p.parts}

    before = contents()
    shown = space.run(sys.executable, "-m", command, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    refused = space.run(sys.executable, "-m", command, "--no-such", "x")
    assert refused.returncode == 1
    [line] = refused.stderr.splitlines()
    assert line.startswith(f"error: python -m {command}: ")
    assert contents() == before
    if command not in TOOLS:
        stage = next(body for name, body in declared().items() if command[7:] == name.split("@")[0])
        assert "Reads:" in shown.stdout and "Writes:" in shown.stdout
        values = yaml.safe_load((space.root / "params.yaml").read_text())
        for section in sections(stage):
            assert f"\n{section}:" in shown.stdout
            assert all(f"\n  {key}:" in shown.stdout for key in values[section])


SCRIPT = """
import errno, os, signal, subprocess, sys, threading, time
from pathlib import Path
from stages.shared.core import command, files
from stages.shared.core.errors import Signalled
class D:
    def __init__(self, does):
        self.does = does
    def __del__(self):
        self.does()
class Panic(BaseException):
    pass
def fail(error):
    raise error
def hear():
    raise Signalled
def kill(number):
    os.kill(os.getpid(), number)
def main():
    print("begun", flush=True)
    {}
command.run(main)
"""
HALF = "with files.whole_folder(Path('out')) as folder: (folder / 'a').write_text('half'); kill(15)"
FULL = "no room on the disk; free some space and run `dvc repro` again"


@pytest.mark.parametrize(
    ("does", "code", "told"),
    [
        ("bytearray(1 << 60)", 1, "error: __main__: out of memory (MemoryError"),
        ("import torch; torch.empty(1 << 60)", 1, "error: __main__: out of memory (RuntimeError"),
        ("raise Panic", 1, "error: __main__: Panic: , in "),
        ("D(hear); 1 / 0", 1, "error: __main__: ZeroDivisionError"),
        ("D(lambda: 1 / 0)", 0, "warning: __main__: passed over ZeroDivisionError"),
        ("threading.Thread(target=lambda: 1 / 0).start()", 0, "warning: __main__: passed over Z"),
        ("kill(signal.SIGHUP)", 129, "stopped: by SIGHUP"),
        ("kill(signal.SIGINT)", 130, "stopped: by SIGINT"),
        (HALF, 143, "stopped: by SIGTERM"),
        ("D(lambda: kill(signal.SIGTERM)); time.sleep(60)", 143, "stopped: by SIGTERM"),
        ("kill(signal.SIGKILL)", -9, "error: __main__: ended without a word"),
        ("kill(signal.SIGSEGV)", -11, "error: __main__: ended without a word"),
        ("fail(OSError(errno.ENOSPC, 'x', 'models/adapter'))", 1, f"error: models/adapter: {FULL}"),
        ("open('/dev/full', 'w').write('x' * 10**6)", 1, f"error: the disk: {FULL}"),
        ("fail(RuntimeError('Error: I/O error (os error 28)'))", 1, f"error: the disk: {FULL}"),
        (
            "fail(RuntimeError('I/O error (os error 5)'))",
            1,
            "error: __main__: RuntimeError: I/O error (os error 5); expected a place that can be "
            "read and written",
        ),
        ("Path('dvc.yaml/a').write_text('')", 1, "error: dvc.yaml/a: Not a directory; expected a"),
        ("open('models/x')", 1, "error: models/x: not there; `dvc repro` runs the stages that"),
        ("fail(OSError(errno.EMFILE, 'x'))", 1, "error: __main__: too many open files"),
        ("{}['ours']", 1, "error: __main__: KeyError: 'ours', in stages/"),
    ],
)
def test_every_end_is_told_in_one_line(space: Workspace, does: str, code: int, told: str) -> None:
    bar = "print('bar', end='', file=sys.stderr, flush=True)" if code < 0 else "None"
    body = f"{bar}\n    {does}"
    done = space.run(sys.executable, "-c", SCRIPT.replace("{}", body, 1))
    assert done.returncode == code, done.stderr
    *_, line = done.stderr.splitlines()
    assert len(done.stderr.splitlines()) == (2 if code < 0 else 1)
    assert line.startswith(told)
    assert not [*space.root.glob("out*")]  # what was half written
    if "ours" in told:
        assert ".logs/__main__.log holds the traceback" in line
        assert "Traceback" in (space.root / ".logs/__main__.log").read_text()
        assert space.run("git", "check-ignore", "--quiet", ".logs/__main__.log").returncode == 0


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
        f"{does}\nfrom stages.shared.core.command import run\nrun(lambda: None)\n"
    )
    done = space.stage("early")
    assert done.returncode == code
    [line] = done.stderr.splitlines()
    assert line.startswith(told)


@pytest.mark.parametrize(
    ("does", "shell", "told"),
    [
        ("print(1, file=sys.stderr)", ">&- 2>&-; echo $?", "0\n"),
        ("time.sleep(1); [print(i) for i in range(9999)]", "| head -n 1; echo ${PIPESTATUS[0]}",
         "begun\n141\nstopped: by SIGPIPE\n"),
        ("c = subprocess.Popen([\"sleep\", \"99\"]); c.send_signal(19); print(c.wait())",
         "; echo $?", "begun\n-9\n0\n"),
    ],
    ids=["closed terminal", "reader gone", "stopped child"],
)  # fmt: skip
def test_a_command_waits_for_nothing_that_is_gone(
    space: Workspace, does: str, shell: str, told: str
) -> None:
    """The watcher kills a child that was stopped; whoever started it finds it ended."""
    script = SCRIPT.replace("{}", does, 1).replace(
        "\ndef fail", "\ncommand.INTERVAL = 0.1\ndef fail"
    )
    done = space.run("bash", "-c", f"{shlex.quote(sys.executable)} -c '{script}' {shell}")
    assert done.stdout + done.stderr == told


def test_what_a_terminal_cannot_show_is_replaced(space: Workspace) -> None:
    does = (
        r"command.display.bar(total=2, desc='\u2192 caf\u00e9', unit='row').update(); "
        r"print('loss 1 \u2192 2, \udcff'); fail(command.UserError('\u65e5.jsonl: not there'))"
    )
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {}):
        done = space.run(sys.executable, "-c", SCRIPT.replace("{}", does, 1), env=environment)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert done.stdout.startswith("begun\nloss 1 ")
        assert "jsonl: not there" in done.stderr


def test_quick_imports_freeze_objects_and_restore_the_collector() -> None:
    frozen = gc.get_freeze_count()
    try:
        with quick_imports():
            assert not gc.isenabled()
            made: list[list[int]] = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen + len(made)
    finally:
        gc.unfreeze()
