"""Placement: which models are sharded where nothing is trained."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stages.shared.core.errors import UserError
from stages.shared.core.machine import machine
from stages.shared.parallel.group import Group
from stages.shared.parallel.placement import shards_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def machine_read_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    machine.cache_clear()
    yield
    monkeypatch.undo()
    machine.cache_clear()


@pytest.mark.parametrize(
    ("shard", "budget", "joined", "expected"),
    [
        ("auto", "", False, 1),  # processes of a CPU share its memory
        ("true", "", False, 2),
        ("false", "", True, 1),
        ("auto", "1", True, 1),
        ("auto", "0.002", True, 2),
    ],
)
def test_a_model_is_divided_where_it_does_not_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shard: str,
    budget: str,
    joined: bool,
    expected: int,
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    for name, value in (("DEVICES", "2"), ("SHARD", shard), ("MEMORY_BUDGET", budget)):
        monkeypatch.setenv(f"QLORA_{name}", value)
    member = (Group(0, 2), CPU) if joined else None
    assert shards_for(tmp_path, CPU, member) == expected


def test_a_part_that_fits_no_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    monkeypatch.setenv("QLORA_MEMORY_BUDGET", "0.001")
    with pytest.raises(UserError, match=r"on each of 2 devices; there are 0\.0\. .* QLORA_DEVICE"):
        shards_for(tmp_path, CUDA, (Group(0, 2), CUDA))
    monkeypatch.setenv("QLORA_SHARD", "false")
    machine.cache_clear()
    with pytest.raises(UserError, match=r"on each of 1 devices; .* Unset QLORA_SHARD, or set"):
        shards_for(tmp_path, CUDA)
