"""Files are whole or not there."""

import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from stages.shared.core import errors, files
from stages.shared.core.errors import UserError


def old(path: Path) -> None:
    path.mkdir()
    (path / "a").write_text("old")


MAKE: list[Callable[[Path], Any]] = [old, Path.touch, os.mkfifo, lambda path: None]


@pytest.mark.parametrize("make", MAKE, ids=["folder", "file", "pipe", "nothing"])
def test_a_folder_is_whole_or_as_it_was(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    """Whatever lies there; `shutil.rmtree` would wait for a writer of a pipe."""
    for name in ("out", "out.partial"):
        make(tmp_path / name)
    before = [*(tmp_path / "out").rglob("*")]
    with pytest.raises(ValueError, match="stop"), files.whole_folder(tmp_path / "out") as partial:
        (partial / "b").write_text("half")
        raise ValueError("stop")
    assert [*(tmp_path / "out").rglob("*")] == before
    with files.whole_folder(tmp_path / "out") as partial:
        (partial / "b").write_text("whole")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "b"]


def test_files_of_a_folder_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    """As safetensors writes them, mode 0600; a read-only file may be a link into DVC's cache."""
    cached = tmp_path / "cached"
    cached.write_bytes(b"")
    cached.chmod(0o444)
    before = os.umask(0o027)
    try:
        with files.whole_folder(tmp_path / "out") as partial:
            save_file({"a": np.zeros(3)}, partial / "model.safetensors")
            (partial / "deep").mkdir()
            (partial / "deep/b").write_text("")
            (partial / "deep/b").chmod(0o600)
            files.link_or_copy(cached, partial / "c")
    finally:
        os.umask(before)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").rglob("*")}
    assert modes == {"model.safetensors": "0o640", "deep": "0o750", "b": "0o640", "c": "0o444"}


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


def test_reading_names_the_file_and_passes_what_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError), errors.reading(path):
        pass
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"a\.json: cannot be .*list instead of an object"):
        files.read_json(path)
    with pytest.raises(MemoryError), errors.reading(path):
        raise MemoryError


def test_require_regular_refuses_what_is_read_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(UserError, match=f"{path}: is .*{what}"):
            files.read_json(path)
    with pytest.raises(UserError, match=f"{tmp_path}: is a folder; expected a file"):
        errors.require_regular(tmp_path)
    errors.require_regular(tmp_path / "missing")
