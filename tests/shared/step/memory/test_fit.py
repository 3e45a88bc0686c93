"""Which settings are chosen, and whether the advice of a refusal is true."""

import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.plan.config import CONFIGS
from stages.shared.model.packing import Example
from stages.shared.parallel import placement
from stages.shared.parallel.placement import GIB, cgroup_limits, total_memory_bytes
from stages.shared.step.memory import fit
from stages.shared.step.memory.fit import Request
from stages.shared.step.memory.predict import StepCounter
from stages.shared.step.memory.setup import MicroBatch, TrainingSetup, Workload, workload_of_counts
from tests.shared.step import adapters

LORA = adapters.LORA | {"r": 64}
QLORA = TrainingSetup("nf4", LORA, double_quant=True)
LONG = workload_of_counts(longest=2048, batch_size=16, supervised_share=0.5)


@pytest.fixture(scope="module")
def llama() -> Iterator[StepCounter]:
    with StepCounter(CONFIGS / "Llama-3-8B.json") as counter:
        yield counter


def request_of(counter: StepCounter, gib: float, setup: TrainingSetup = QLORA, **changes: Any):
    return Request(counter, setup, LONG, int(gib * GIB), **changes)


def test_more_memory_never_makes_a_step_slower(llama: StepCounter) -> None:
    before = None
    for gib in (12, 16, 24, 48, 80):
        request = request_of(llama, gib)
        choice = fit.choose(request)
        assert choice and fit.fits(request, choice)
        cost = fit.cost("cuda", choice.micro_batch_tokens, choice.gradient_checkpointing)
        assert before is None or cost <= before
        before = cost
    assert choice
    assert (choice.micro_batch_tokens, choice.gradient_checkpointing) == (8192, False)


def test_long_checkpointed_micro_batches_go_before_short_ones(llama: StepCounter) -> None:
    """Short ones cost a GPU's host as much each: in 16 GiB 2,048 tokens would fit without."""
    choice = fit.choose(request_of(llama, 16))
    assert choice
    assert (choice.micro_batch_tokens, choice.gradient_checkpointing) == (8192, True)


def test_settings_of_the_user_are_kept(llama: StepCounter) -> None:
    request = request_of(llama, 80, micro_batch_tokens=256, gradient_checkpointing=True)
    choice = fit.choose(request)
    assert choice
    assert (choice.micro_batch_tokens, choice.gradient_checkpointing) == (256, True)
    setup = replace(QLORA, gradient_checkpointing=True)  # a longer conversation stands alone
    assert choice.prediction == llama.predict(setup, MicroBatch((2048,), 1024))


def test_weights_are_sharded_only_where_they_do_not_fit_whole(llama: StepCounter) -> None:
    whole = fit.choose(request_of(llama, 24, shards=(1, 8)))
    assert whole and whole.shards == 1
    less = fit.smallest(request_of(llama, 24)).device_bytes / GIB - 1
    assert fit.choose(request_of(llama, less)) is None
    sharded = fit.choose(request_of(llama, less, shards=(1, 8)))
    assert sharded and sharded.shards == 8


def test_workload_packs_as_training_does() -> None:
    def conversation(tokens: int, row: int) -> Example:
        return Example(np.zeros(tokens + 1, dtype=np.int64), np.arange(tokens + 1) > 4, row)

    steps = [[conversation(n, i) for i, n in enumerate((60, 50, 40))], [conversation(90, 0)]]
    assert Workload(steps).micro_batches(100) == {
        MicroBatch((60, 40), 56 + 36),
        MicroBatch((50,), 46),
        MicroBatch((90,), 86),
    }
    assert Workload(steps).longest == 90
    work = workload_of_counts(longest=100, batch_size=4, supervised_share=0.25)
    assert work.micro_batches(250) == {MicroBatch((100, 100), 50)}
    assert work.cut(40).longest == 39 or work.cut(40).longest == 40


def test_device_bytes_are_those_of_all_processes(tmp_path: Path) -> None:
    setup = replace(QLORA, device="cpu", lora=LORA | {"r": 16})
    work = workload_of_counts(longest=256, batch_size=8, supervised_share=0.5)
    with StepCounter(CONFIGS / "Qwen1.5-0.5B.json") as counter:
        request = Request(counter, setup, work, 32 * GIB)
        alone, four = fit.choose(request), fit.choose(replace(request, processes=4))
        assert alone and four and four.device_bytes == 4 * alone.device_bytes


CANNOT_FIT: dict[str, tuple[float, TrainingSetup, dict[str, Any]]] = {
    "set by the user": (14, QLORA, {"micro_batch_tokens": 4096, "gradient_checkpointing": False}),
    "bf16": (16, TrainingSetup("bf16", LORA), {}),
    "all weights": (60, TrainingSetup("bf16", None), {"instead_of_full": LORA}),
}


@pytest.mark.parametrize("name", CANNOT_FIT)
def test_refusal_gives_remedies_that_help(llama: StepCounter, name: str) -> None:
    gib, setup, changes = CANNOT_FIT[name]
    request = request_of(llama, gib, setup, **changes)
    assert fit.choose(request) is None
    line = fit.refusal(request)
    assert "\n" not in line
    assert line.startswith("memory: training needs ")
    assert f"there are {gib}.00. Set " in line
    words = fit.remedies(request)
    assert 1 <= len(words) <= 3
    expected = {
        "set by the user": "QLORA_GRADIENT_CHECKPOINTING=true",
        "bf16": "quantize.precision nf4",
        "all weights": "train.method lora",
    }
    assert expected[name] in words[0]
    every = dict(fit._changes(request))
    for word in words:
        if word in every:
            assert fit.choose(every[word]), word


def test_refusal_names_the_devices_that_would_do(llama: StepCounter) -> None:
    needed = fit.smallest(request_of(llama, 1)).device_bytes / GIB
    assert fit.refusal(request_of(llama, needed - 1)).endswith("Or train on two devices, sharded.")
    less = fit.smallest(request_of(llama, 1, shards=(4,))).device_bytes / GIB
    assert "on four devices, sharded" in fit.refusal(request_of(llama, less, shards=(1, 2)))
    for setup in (replace(QLORA, device="cpu"), TrainingSetup("bf16", None)):
        assert "sharded" not in fit.refusal(request_of(llama, 4, setup))


def test_full_fine_tuning_fits_several_devices_sharded(llama: StepCounter) -> None:
    """Of 16 bytes a parameter each of eight holds two, and what it gathers."""
    full = TrainingSetup("bf16", None)
    whole, eighth = (
        fit.smallest(request_of(llama, 80, full, shards=(n,))).prediction.parts for n in (1, 8)
    )
    for name in ("gradients", "optimizer"):
        assert whole[name] / 8 <= eighth[name] < whole[name] / 8 + 2.2e9
    assert fit.refusal(request_of(llama, 80, full)).endswith("on two devices, sharded.")


def test_refusal_without_a_remedy_says_so(llama: StepCounter) -> None:
    assert "Take a smaller model or more memory." in fit.refusal(request_of(llama, 1))


def test_scoring_counts_where_it_is_larger_than_training(llama: StepCounter) -> None:
    work = LONG.cut(256)
    small = replace(QLORA, lora=adapters.LORA)
    request = replace(request_of(llama, 80, small, micro_batch_tokens=256), workload=work)
    request = replace(request, gradient_checkpointing=True)
    scored = replace(request, scored=frozenset({MicroBatch((1024,), 1000)}))
    more, alone = fit.smallest(scored), fit.smallest(request)
    assert more.prediction.phase.startswith("scoring")
    assert more.device_bytes - alone.device_bytes > 1e8  # 1.03 GB of logits, no gradients


def test_budget_goes_before_the_memory_of_the_machine() -> None:
    assert total_memory_bytes("cpu", 1.5) == int(1.5 * GIB)
    pages = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert total_memory_bytes("cpu") <= 1.01 * pages


def test_ulimit_bounds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    soft = {resource.RLIMIT_AS: 3 * GIB, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(placement.resource, "getrlimit", lambda kind: (soft[kind], -1))
    assert total_memory_bytes("cpu") == min(3 * GIB, total_memory_bytes("cpu", 1e6))
    assert total_memory_bytes("cpu", 2.0) == 2 * GIB


@pytest.mark.parametrize(
    ("proc", "files", "expected"),
    [
        ("0::/a/b", {"a/memory.max": "5000", "a/b/memory.max": "max"}, [5000]),
        ("0::/gone", {"memory.max": "7000"}, [7000]),
        ("3:cpu,memory:/a", {"memory/a/memory.limit_in_bytes": "4000"}, [4000]),
        ("3:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, []),
        ("2:cpu:/a", {"memory/a/memory.limit_in_bytes": "4000"}, []),
    ],
    ids=["version 2", "container", "version 1", "no limit", "another controller"],
)
def test_cgroup_limits_are_read(
    tmp_path: Path, proc: str, files: dict[str, str], expected: list[int]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "proc").write_text(f"{proc}\n")
    assert list(cgroup_limits(tmp_path / "proc", tmp_path)) == expected
    assert list(cgroup_limits(tmp_path / "none", tmp_path)) == []
