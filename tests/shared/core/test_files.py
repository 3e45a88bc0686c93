"""Files are whole or not there, and a full disk is one line."""

import errno
import os
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from stages.shared.core import errors, files
from stages.shared.core.errors import UserError


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("first", "second"):
        with files.whole_folder(target) as partial:
            (partial / "a").write_text(text)
            assert not target.exists() or (target / "a").read_text() == "first"
        assert (target / "a").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(ValueError, match="stop"), files.whole_folder(target) as partial:
        (partial / "a").write_text("half")
        raise ValueError("stop")
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.json"
    files.write_json(target, {"é": [1, None]})
    assert files.read_json(target) == {"é": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(target, float("nan"))
    assert files.read_json(target) == {"é": [1, None]}
    assert [p.name for p in target.parent.iterdir()] == ["a.json"]


def test_a_folders_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_text("x")
    one = files.folder_sha256(tmp_path)
    (tmp_path / "b" / "c").rename(tmp_path / "b" / "d")
    two = files.folder_sha256(tmp_path)
    (tmp_path / "b" / "d").write_text("y")
    assert len({one, two, files.folder_sha256(tmp_path)}) == 3


def test_too_little_room_is_told_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    files.require_space(tmp_path / "not" / "there", 1000, "the model")
    with pytest.raises(UserError, match=r"0\.00 GB are free; the model needs 2\.00 GB"):
        files.require_space(tmp_path, 2 * 10**9, "the model")


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
def test_a_disk_that_fills_up_while_tensors_are_written_is_one_line(
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
    assert capsys.readouterr().err == "stopped by SIGTERM\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_bug_keeps_its_traceback() -> None:
    def fail() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        errors.run(fail)
