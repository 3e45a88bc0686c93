"""Sharded weights: bytes of each process, and results equal to whole ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from benchmarks import memory
from benchmarks.memory import Setting
from stages.evaluate import generate
from stages.evaluate.evaluate import evaluate_on
from stages.evaluate.inputs import Evaluate
from stages.merge import verify
from stages.merge.merge import held_out, merge_adapter
from stages.shared.model import loading
from stages.shared.parallel.group import Group
from stages.shared.parallel.shards import Shards
from stages.shared.step import adapter
from tests import devices, tiny
from tests.architectures import BESIDES, saved
from tests.shared.step.adapters import CPU, moved

SETTINGS = {
    "untied head": [
        Setting("bf16", None, True, (40, 90, 50)),
        Setting("nf4", 8, True, (40, 90, 50)),
        Setting("int8", 8, False, (40,)),
    ],
    "Qwen3": [
        Setting("bf16", 8, True, (40, 90)),
        Setting("bf16", None, False, (40, 90), optimizer="adamw_8bit"),
    ],
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


def evaluations(group: Group, work: Path) -> list[Any]:
    """Of an adapter, a merged model and one with learned positions; and the proof of the merge."""
    data, sharded = work / "prepared", group.size > 1
    if sharded:  # a dense model's weights too
        merged = loading.load_model(work / "merged", CPU, on_cpu=True)
        halves = sum(len(unit.shard) for unit in Shards(merged, group, CPU).units)
        assert halves < 0.6 * sum(p.nbytes for p in merged.parameters())
    wanted = Evaluate(generate_rows=12, max_new_tokens=6, prompts=12, seed=0)
    beside = (work / "nf4", work / "base", data, wanted)
    found: list[Any] = [
        evaluate_on(group, CPU, sharded, name, work / name, *beside)
        for name in ("adapter", "merged", "gpt2")
    ]
    models = (work / "merged", work / "adapter", work / "nf4")
    return [*found, verify._share_of_agreement(group, CPU, sharded, models, held_out(data), None)]


def test_sharded_evaluation_and_proof_equal_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches of replies: one process generates one more than it needs."""
    tiny.prepared(tmp_path / "prepared")
    model = moved(tiny.quantize(tmp_path / "nf4", "nf4"))
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    adapter.save(model, tmp_path / "adapter", torch.bfloat16)
    tuned = loading.attach(loading.load_dequantized(tmp_path / "nf4", CPU), tmp_path / "adapter")
    merge_adapter(tuned, tmp_path / "merged", torch.float16)
    saved(tmp_path / "gpt2", "gpt2", BESIDES["gpt2"])
    monkeypatch.setattr(generate, "BATCH", 5)
    *alone, proof = evaluations(Group(), tmp_path)
    *shared, shared_proof = devices.together(2, evaluations, tmp_path)
    assert shared == alone
    assert shared_proof.positions == proof.positions > 0
    assert shared_proof.top1_agreement == proof.top1_agreement
    assert shared_proof.kl_divergence == pytest.approx(proof.kl_divergence, rel=1e-6, abs=1e-9)


class Name(str):
    """With a hash of each process, as Python gives strings outside of tests, which fork."""

    def __hash__(self) -> int:
        return ord(self) * (1 - 2 * distributed.get_rank())


def states_of_one_matrix(group: Group, base: Path) -> dict[str, float]:
    shards = Shards(adapter.load_for_full(base, CPU, on_cpu=True), group, CPU, trained=True)
    values = {Name("a"): 1.0, Name("b"): 2.0}
    gathered = shards.gather(lambda p: {n: torch.full((p.numel(),), values[n]) for n in values})
    *_, states = [states for unit in gathered for states in unit.values()]
    return {str(name): states[name].mean().item() for name in values}


def test_gather_has_one_order_in_all_processes(tmp_path: Path) -> None:
    """Else each would send another of AdamW's states into the same sum."""
    base = tiny.quantize(tmp_path / "base", "fp32")
    assert devices.together(2, states_of_one_matrix, base) == {"a": 1.0, "b": 2.0}
