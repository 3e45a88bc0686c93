"""Training killed, stopped and resumed for real ends with the bytes of an uninterrupted one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from stages.shared.core import files
from tests import tiny, workspace
from tests.workspace import Workspace

TRAIN = (sys.executable, "-m", "stages.train")
DVC = (sys.executable, "-m", "dvc")
EVERY_FIVE = {"QLORA_CHECKPOINT_STEPS": "5"}
SMALL = {
    "data.path": "mine.jsonl",
    "lora.r": 4,
    "lora.dropout": 0.2,  # what is dropped must be what an uninterrupted run drops
    "train.epochs": 6,
    "train.batch_size": 4,  # 36 conversations, 9 steps an epoch: checkpoints fall inside epochs
    "train.learning_rate": 5e-3,
    "train.patience": 100,
}


def make(root: Path) -> Workspace:
    made = workspace.make(root, SMALL)
    tiny.prepared(made.root / "data/prepared", conversations=36, held_out=8)
    tiny.quantize(made.root / "models/quantized", "nf4")
    tiny.tokenizer().save_pretrained(made.root / "models/tokenizer")
    files.write_json(made.root / "models/source.json", {"source": "path"})
    return made


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    """A workspace where everything before `train` is there."""
    return make(tmp_path / "space")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a training ends with that nobody disturbs."""
    space = make(tmp_path_factory.mktemp("uninterrupted") / "space")
    done = space.run(*TRAIN, env=EVERY_FIVE)
    assert done.returncode == 0, done.stderr
    assert "going on" not in done.stderr
    assert resumed_from(space) is None
    return outcome(space)


def start(
    space: Workspace, command: tuple[str, ...], env: dict[str, str] = EVERY_FIVE
) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, that leaves the watcher a core when it asks.

    A checkpoint is being written for a few milliseconds: who waits for one may miss some.
    """
    return subprocess.Popen(
        ("nice", "-n", "10", *command),
        cwd=space.root,
        env=space.environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_checkpoint(
    space: Workspace, running: subprocess.Popen[str] | None, step: int, ending: str = ""
) -> None:
    """Until a checkpoint at `step` or later is there; with `.partial`, is being written."""
    for _ in range(60_000):
        names = [p.name for p in space.root.glob(f".checkpoints/*/step-??????{ending}")]
        if any(int(name[5:11]) >= step for name in names):
            return
        if running:
            assert running.poll() is None, running.communicate()
        time.sleep(0.001)
    raise AssertionError("no checkpoint within a minute")


def kill_at(
    space: Workspace, step: int, ending: str = "", command: tuple[str, ...] = TRAIN
) -> None:
    """Kill the whole process group after a checkpoint."""
    running = start(space, command)
    wait_for_checkpoint(space, running, step, ending)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate(timeout=60)
    assert running.returncode == -signal.SIGKILL


def outcome(space: Workspace) -> dict[str, str]:
    """The hash of every file that training ends with, its loss curve among them."""
    kept = sorted((space.root / "models/adapter").iterdir())
    return {p.name: files.sha256(p) for p in [*kept, space.root / "reports/train/loss.csv"]}


def finish(space: Workspace) -> str:
    """Run the stage again, to its end; returns what it said."""
    done = space.run(*TRAIN, env=EVERY_FIVE)
    assert done.returncode == 0, done.stderr
    assert not list(space.root.glob(".checkpoints/*"))
    return done.stderr


def resumed_from(space: Workspace) -> int | None:
    return files.read_json(space.root / "reports/train.json")["resumed_from_step"]


def test_killed_at_several_steps_it_ends_with_the_same_bytes(
    space: Workspace, uninterrupted: dict[str, str]
) -> None:
    for step, ending in ((5, ""), (20, ".partial"), (30, "")):  # the second while it writes one
        kill_at(space, step, ending)
        assert not (space.root / "models/adapter").exists()
    newest = max(space.root.glob(".checkpoints/*/step-??????"))
    if int(newest.name[5:]) % 9 == 0:  # by chance: the one before is within an epoch
        shutil.rmtree(newest)
    assert "going on from" in finish(space)
    last = resumed_from(space)
    assert last is not None
    assert last >= 30
    assert last % 9 != 0  # in the middle of an epoch
    assert outcome(space) == uninterrupted
    rows = (space.root / "reports/train/loss.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(55))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_of_that_very_step(
    space: Workspace, uninterrupted: dict[str, str], number: int
) -> None:
    running = start(space, TRAIN)
    wait_for_checkpoint(space, running, 5)
    time.sleep(0.1)  # some steps further
    running.send_signal(number)
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    message = printed.splitlines()[-1]
    found = re.search(r"stopped: training was ended by (\w+) after step (\d+) of 54", message)
    assert found, printed
    assert found[1] == signal.Signals(number).name
    assert "`dvc repro` goes on from there" in message
    finish(space)
    assert resumed_from(space) == int(found[2])
    assert outcome(space) == uninterrupted


TWO = {"QLORA_CHECKPOINT_STEPS": "1", "QLORA_DEVICES": "2"}


@pytest.fixture(scope="module")
def on_two_devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    space = make(tmp_path_factory.mktemp("two") / "space")
    space.set_params({"train.max_steps": 6})
    done = space.run(*TRAIN, env=TWO)
    assert done.returncode == 0, done.stderr
    return outcome(space)


def test_two_devices_stop_together_at_ctrl_c(
    space: Workspace, on_two_devices: dict[str, str]
) -> None:
    """In their first evaluation, or the step after it: it takes a moment to reach both."""
    space.set_params({"train.max_steps": 6})
    running = subprocess.Popen(
        TRAIN,
        cwd=space.root,
        env=space.environment(TWO),
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert running.stderr is not None
    said = b""
    while b"held-out" not in said:
        said += os.read(running.stderr.fileno(), 1000)
    os.killpg(running.pid, signal.SIGINT)
    said += running.stderr.read()
    assert running.wait(timeout=60) == 130, said.decode()
    *_, line = said.decode().splitlines()
    assert re.match(r"stopped: training was ended by SIGINT after step [0-5] of 6; .checkp", line)
    assert b"Traceback" not in said and b"resource_tracker" not in said
    done = space.run(*TRAIN, env=TWO)
    assert "going on from" in done.stderr
    assert outcome(space) == on_two_devices


def workers(running: subprocess.Popen[str]) -> list[psutil.Process]:
    """By rank; the launcher has another child, which watches it."""
    children = psutil.Process(running.pid).children()
    return [p for p in children if "stages.shared.parallel.worker" in p.cmdline()]


def test_a_lost_worker_restarts_its_group_once(
    space: Workspace, on_two_devices: dict[str, str]
) -> None:
    space.set_params({"train.max_steps": 6})
    running = start(space, TRAIN, TWO)
    wait_for_checkpoint(space, running, 2)
    workers(running)[1].kill()
    printed, _ = running.communicate(timeout=240)
    assert running.returncode == 0, printed
    lost = re.findall(
        r"warning: process \d+, one of 2, was stopped .*; its group starts again", printed
    )
    assert len(lost) == 1 and "going on from" in printed and "Traceback" not in printed
    assert outcome(space) == on_two_devices
    assert resumed_from(space)


def test_a_worker_that_is_stopped_ends_in_one_line(space: Workspace) -> None:
    running = start(space, TRAIN, TWO | {"QLORA_RESTARTS": "0"})
    wait_for_checkpoint(space, running, 2)
    workers(running)[0].suspend()
    printed, _ = running.communicate(timeout=240)
    assert running.returncode == 1, printed
    line = printed.splitlines()[-1]
    assert re.search(r"error: process \d+, one of 2, was stopped or ended", line), printed
    assert "Traceback" not in printed


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    space: Workspace, uninterrupted: dict[str, str]
) -> None:
    kill_at(space, 20)
    *_, older, newest = sorted(space.root.glob(".checkpoints/*/step-??????"))
    with (newest / "state.pt").open("r+b") as file:
        file.seek(2000)
        file.write(b"\x00\xff")
    assert f"{newest.name}: state.pt is not what was written; skipped" in finish(space)
    assert resumed_from(space) == int(older.name[5:])
    assert outcome(space) == uninterrupted


def test_two_at_once_never_write_the_same_state(space: Workspace) -> None:
    running = start(space, TRAIN)
    wait_for_checkpoint(space, running, 5)
    os.killpg(running.pid, signal.SIGSTOP)  # alive, and in no hurry
    second = space.run(*TRAIN)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    assert second.returncode == 1
    line = second.stderr.splitlines()[-1]
    assert line.startswith("error: .checkpoints/")
    assert "another process is training" in line
    finish(space)  # a lock that was held dies with its process


def commit(space: Workspace) -> None:
    for command in (("add", "--all"), ("commit", "--quiet", "--message", "all")):
        space.run("git", "-c", "user.name=a", "-c", "user.email=a@b.c", *command)


def pipeline(space: Workspace) -> None:
    """Only `train`, so that DVC needs no stage before it."""
    path = space.root / "dvc.yaml"
    stages = yaml.safe_load(path.read_text())["stages"]
    path.write_text(yaml.safe_dump({"stages": {"train": stages["train"]}}))
    prepared = (
        f"data/prepared/{name}" for name in ("train.parquet", "eval.parquet", "format.json")
    )
    for name in (*prepared, *(f"models/{n}" for n in ("quantized", "tokenizer", "source.json"))):
        assert space.dvc("add", name).returncode == 0
    commit(space)


def test_dvc_repro_goes_on_where_it_was_killed(
    space: Workspace, uninterrupted: dict[str, str]
) -> None:
    pipeline(space)
    kill_at(space, 20, command=(*DVC, "repro", "train"))
    done = space.dvc("repro", "train", env=EVERY_FIVE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from" in done.stderr
    assert outcome(space) == uninterrupted


def test_a_temporary_workspace_goes_on_where_another_was_killed(
    space: Workspace, uninterrupted: dict[str, str]
) -> None:
    """Each `dvc exp run --temp` has a folder of its own; the state lies in the repository."""
    pipeline(space)
    run = (*DVC, "exp", "run", "--temp", "--name", "killed")
    kill_at(space, 20, command=run)
    done = space.run(*run, env=EVERY_FIVE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from" in done.stderr
    assert space.dvc("exp", "apply", "killed").returncode == 0
    assert outcome(space) == uninterrupted


def start_worker(space: Workspace, name: str) -> None:
    """Queue the experiment and start a worker, which goes on by itself."""
    assert space.dvc("exp", "run", "--queue", "--name", name).returncode == 0
    subprocess.run(
        (*DVC, "queue", "start"),
        cwd=space.root,
        env=space.environment(EVERY_FIVE),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def training_below(folder: Path) -> int:
    """The process that trains in a workspace below a folder."""
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command, where = process.info["cmdline"] or [], process.info["cwd"] or ""
        if "stages.train" in command and where.startswith(str(folder)):
            return process.pid
    raise AssertionError("nobody trains")


def test_the_queue_goes_on_where_its_worker_was_killed(
    space: Workspace, uninterrupted: dict[str, str]
) -> None:
    pipeline(space)
    start_worker(space, "first")
    wait_for_checkpoint(space, None, 20)
    os.killpg(os.getpgid(training_below(space.root)), signal.SIGKILL)  # the worker and all
    start_worker(space, "second")
    for _ in range(240):
        if "Success" in space.dvc("queue", "status").stdout:
            break
        time.sleep(0.5)
    assert "going on from" in space.dvc("queue", "logs", "second").stdout
    assert space.dvc("exp", "apply", "second").returncode == 0
    assert outcome(space) == uninterrupted
