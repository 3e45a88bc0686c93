"""Weights divided among processes: what each holds, and what it computes with them."""

from pathlib import Path

import pytest
from torch import distributed

from benchmarks import memory
from benchmarks.memory import Setting
from stages.shared.parallel.group import Group
from tests import devices

SETTINGS = {
    "untied head": [Setting("nf4", 8, True, (40, 90, 50)), Setting("int8", 8, False, (40,))],
    "Qwen3": [Setting("bf16", 8, True, (40, 90))],
}


def live_bytes(group: Group, work: Path) -> list[list[int]]:
    """Of each rank, for each setting."""
    own = [memory.measure(work / m, s, group) for m, some in SETTINGS.items() for s in some]
    every: list[list[int]] = [[]] * group.size
    distributed.all_gather_object(every, own)
    return every


def test_count_of_a_rank_equals_its_live_bytes(tmp_path: Path) -> None:
    expected, whole = [], []
    for name, some in SETTINGS.items():
        base = memory.random_base(memory.MODELS[name], tmp_path / name)
        for setting in some:
            memory.quantized(base, setting)
            predicted = memory.predict(base / "config.json", setting, shards=2)
            expected.append(predicted.total_bytes)
            whole.append(memory.predict(base / "config.json", setting).total_bytes)
    measured = devices.together(2, live_bytes, tmp_path)
    for rank in measured:
        assert rank == pytest.approx(expected, rel=0.02)
    assert all(own < all_of_it for own, all_of_it in zip(expected, whole, strict=True))
