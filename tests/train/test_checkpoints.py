"""Checkpoints: whole or absent, and of one training alone."""

import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.train import checkpoints as naming
from stages.train.checkpoints import Checkpoints, claim
from tests import tiny, workspace
from tests.test_contract import ROOT, declared_code, entry_of, python_files, reached_from
from tests.train.running import settings, train_on

PLAN = {"micro_batch_tokens": 7}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Checkpoints]:
    """Three were written, the last two are kept."""
    with claim(tmp_path, "name", keep=2) as checkpoints:
        for step in (5, 10, 15):
            with files.whole_folder(checkpoints.best) as best:
                (best / "adapter.bin").write_text(f"best at {step}")
            checkpoints.write(step, {"step": step, "weights": torch.full((3,), step)}, PLAN)
        yield checkpoints


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(p.name for p in checkpoints.folder.iterdir())


def test_the_newest_comes_back_with_the_best_of_its_time(kept: Checkpoints) -> None:
    assert names(kept) == ["best", "step-000010", "step-000015"]
    with files.whole_folder(kept.best) as best:
        (best / "adapter.bin").write_text("of a step that was lost")
    found = kept.latest()
    assert found is not None
    assert found.manifest["plan"] == PLAN
    assert found.state()["weights"].tolist() == [15, 15, 15]
    assert (kept.best / "adapter.bin").read_text() == "best at 15"


def test_checkpoints_are_in_order_beyond_six_digits(tmp_path: Path) -> None:
    with claim(tmp_path, "name", keep=2) as checkpoints:
        with files.whole_folder(checkpoints.best):
            pass
        for step in (999_950, 999_975, 1_000_000):
            checkpoints.write(step, {"step": step}, PLAN)
        assert names(checkpoints) == ["best", "step-1000000", "step-999975"]
        found = checkpoints.latest()
        assert found is not None and found.state()["step"] == 1_000_000


def truncated(folder: Path) -> None:
    state = folder / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])


def altered(folder: Path) -> None:
    best = folder / "best/adapter.bin"
    best.unlink()  # a hard link: the file in best/ is the same
    best.write_text("something else")


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"step": 15, "fi')


def without_best(folder: Path) -> None:
    shutil.rmtree(folder / "best")


def with_a_stranger(folder: Path) -> None:
    (folder / "best/other.bin").write_text("who?")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (truncated, "state.pt is not what was written"),
        (altered, "best/adapter.bin is not what was written"),
        (without_manifest, "manifest.json cannot be read"),
        (cut_manifest, "manifest.json cannot be read"),
        (without_best, "best/adapter.bin is missing"),
        (with_a_stranger, "best/other.bin is not what was written"),
    ],
)
def test_a_damaged_one_is_skipped_with_a_warning(
    kept: Checkpoints,
    damage: Callable[[Path], None],
    fault: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(kept.folder / "step-000015")
    found = kept.latest()
    assert found is not None
    assert found.manifest["step"] == 10
    assert (kept.best / "adapter.bin").read_text() == "best at 10"
    assert f"step-000015: {fault}; skipped" in capsys.readouterr().err
    damage(kept.folder / "step-000010")
    assert kept.latest() is None
    assert not kept.folder.exists()


def test_an_unfinished_one_is_ignored(kept: Checkpoints) -> None:
    (kept.folder / "step-000015").rename(kept.folder / "step-000020.partial")
    found = kept.latest()
    assert found is not None
    assert found.manifest["step"] == 10


def test_a_failed_write_leaves_the_others(kept: Checkpoints) -> None:
    with pytest.raises(AttributeError):
        kept.write(20, {"cannot be saved": lambda: None}, PLAN)
    assert names(kept) == ["best", "step-000010", "step-000015"]


def test_one_holder_at_a_time_and_nothing_left_after_success(tmp_path: Path) -> None:
    with claim(tmp_path, "name", keep=2) as checkpoints:
        with files.whole_folder(checkpoints.best):
            pass
        with (
            pytest.raises(UserError, match="another process is training") as error,
            claim(tmp_path, "name", keep=2),
        ):
            pass
        assert "\n" not in str(error.value)
        with claim(tmp_path, "another", keep=2):
            pass
        checkpoints.clear()
    assert list((tmp_path / ".checkpoints").iterdir()) == []


def test_a_disk_too_full_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 100_000))
    data = tiny.prepared(tmp_path / "prepared")
    model = tiny.quantize(tmp_path / "quantized", "nf4")
    with pytest.raises(UserError, match=r"2 checkpoints of 0\.00 GB.*QLORA_KEEP_CHECKPOINTS"):
        train_on(settings(), data, model, tmp_path / "adapter")
    assert not list((tmp_path / ".checkpoints").glob("*/*"))


def test_a_checkpoint_holds_what_learns_and_not_the_frozen_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def write(self: Checkpoints, step: int, state: dict, plan: dict, tensors: Any) -> None:
        seen[step] = list(tensors)
        original(self, step, state, plan, seen[step])

    original = Checkpoints.write
    monkeypatch.setattr(Checkpoints, "write", write)
    data = tiny.prepared(tmp_path / "prepared")
    model = tiny.quantize(tmp_path / "quantized", "nf4")
    metrics = train_on(settings(), data, model, tmp_path / "adapter").metrics
    [tensors] = seen[12]
    assert all("lora_" in name for name in tensors)
    numbers = sum(values["weight"].numel() for values in tensors.values())
    assert numbers == metrics["trainable_parameters"]
    # fp32 weights, two fp32 states, the best adapter; what else there is, is small.
    assert 16 * numbers < metrics["checkpoint_bytes"] < 16 * numbers + 200_000


def test_all_that_shapes_a_training_is_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = tmp_path / "train.parquet", tmp_path / "model"
    model.mkdir()
    data.write_text("rows")
    (model / "weights").write_text("weights")

    def name(device: str = "cpu", **changes: object) -> str:
        return naming.fingerprint(naming.identity(settings(**changes), device, [data, model]))

    seen = [name(), name(lora__r=8), name(train__seed=1), name("cuda")]
    data.write_text("other rows")
    seen.append(name())
    (model / "weights").write_text("other weights")
    seen.append(name())
    (model / "weights").rename(model / "renamed")
    seen.append(name())
    monkeypatch.setattr(naming, "versions", lambda: {"torch": "another"})
    seen.append(name())
    monkeypatch.setattr(naming, "code_sha256", lambda: "another")
    seen.append(name())
    assert len(set(seen)) == len(seen)
    assert name() == name()


def test_fingerprint_changes_with_the_code_that_train_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = workspace.make(tmp_path / "space")
    monkeypatch.chdir(space.root)
    before = naming.code_sha256()
    imported = {f.relative_to(ROOT) for f in reached_from(entry_of("train"))}
    others = {f.relative_to(ROOT) for f in python_files(ROOT / "stages")} - imported
    assert imported and others
    for file in sorted(others):
        (space.root / file).write_text("# edited\n")
    assert naming.code_sha256() == before
    for name in declared_code("train"):
        file = min(python_files(space.root / name))
        assert file.relative_to(space.root) in imported
        original = file.read_text()
        file.write_text(original + "# edited\n")
        assert naming.code_sha256() != before, file
        file.write_text(original)
