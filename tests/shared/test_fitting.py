"""Which settings are chosen, and whether the advice of a refusal is true."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.shared import fitting, peak, refusal, workload
from stages.shared.fitting import GIB, Request
from stages.shared.peak import Prediction
from stages.shared.step.adapter_sizes import adapter_of
from stages.shared.total_memory import total_memory_bytes
from stages.shared.tuning import Tuning
from stages.shared.workload import Workload
from stages.shared.workspace import MicroBatch
from tests.plan.cases import SMOLLM2, shipped

LLAMA = shipped("Llama-3-8B")
ADAPTER = adapter_of(LLAMA.tensors, rank=64)
QLORA = Tuning("nf4", ADAPTER, double_quant=True)
LONG = workload.of_counts(longest=2048, batch_size=16, supervised_share=0.5)


def request(gib: float, tuning: Tuning = QLORA, **asked) -> Request:
    return Request(LLAMA, tuning, LONG, int(gib * GIB), **asked)


def test_checkpointing_is_off_where_it_is_not_needed_and_on_where_it_is():
    large, small = fitting.choose(request(80)), fitting.choose(request(12))
    assert large and small
    assert (large.gradient_checkpointing, small.gradient_checkpointing) == (False, True)
    assert large.micro_batch_tokens == 8192


def test_what_is_chosen_fits_and_nothing_faster_does():
    for gib in (12, 16, 24, 32, 48):
        asked = request(gib)
        choice = fitting.choose(asked)
        assert choice
        tuning = replace(QLORA, gradient_checkpointing=choice.gradient_checkpointing)
        assert fitting.fits(LLAMA, tuning, choice.prediction, asked.total_bytes)
        other = fitting.choose(
            replace(asked, gradient_checkpointing=not choice.gradient_checkpointing)
        )
        assert other is None or fitting._cost(QLORA, other) > fitting._cost(QLORA, choice)


def test_long_micro_batches_are_worth_computing_activations_again_for():
    """Short ones cost a GPU's host as much each: in 16 GiB 2,048 tokens would fit without."""
    choice = fitting.choose(request(16))
    assert choice
    assert (choice.micro_batch_tokens, choice.gradient_checkpointing) == (8192, True)
    without = fitting.choose(request(16, gradient_checkpointing=False))
    assert without
    assert without.micro_batch_tokens == 2048


def test_more_memory_never_makes_a_step_slower():
    costs = []
    for gib in range(10, 60, 5):
        choice = fitting.choose(request(gib))
        if choice:
            costs.append(fitting._cost(QLORA, choice))
    assert len(costs) > 5
    assert costs == sorted(costs, reverse=True)


def test_what_the_user_sets_is_kept():
    choice = fitting.choose(request(80, micro_batch_tokens=700, gradient_checkpointing=True))
    assert choice
    assert (choice.micro_batch_tokens, choice.gradient_checkpointing) == (700, True)


def test_a_conversation_longer_than_a_micro_batch_counts_whole():
    choice = fitting.choose(request(80, micro_batch_tokens=256))
    assert choice
    alone = peak.predict(LLAMA, QLORA, MicroBatch(2048, 1024))
    assert choice.prediction.total_bytes == alone.total_bytes


def test_a_micro_batch_holds_no_more_than_its_step():
    work = workload.of_counts(longest=100, batch_size=4, supervised_share=0.25)
    assert work.micro_batches(4096) == {MicroBatch(400, 100, together=(4, 112))}
    assert work.micro_batches(250) == {MicroBatch(200, 50, together=(2, 112))}
    assert work.cut(40).micro_batches(4096) == {MicroBatch(160, 0, together=(4, 48))}


def test_micro_batches_are_those_that_training_packs():
    from stages.shared.model.packing import Example

    def conversation(tokens: int, row: int) -> Example:
        """So many go through the model: the last of it is only predicted."""
        return Example(np.zeros(tokens + 1, dtype=np.int64), np.arange(tokens + 1) > 4, row)

    steps = [[conversation(n, i) for i, n in enumerate((60, 50, 40))], [conversation(90, 0)]]
    assert Workload(steps).micro_batches(100) == {
        MicroBatch(100, 56 + 36, together=(2, 64)),
        MicroBatch(50, 46, together=(1, 50)),
        MicroBatch(90, 86, together=(1, 90)),
    }
    assert Workload(steps).longest == 90


def small_on_a_cpu(gib: float, **asked) -> Request:
    tuning = Tuning("nf4", adapter_of(SMOLLM2.tensors, rank=16), double_quant=True, device="cpu")
    work = workload.of_counts(longest=256, batch_size=8, supervised_share=0.5)
    return Request(SMOLLM2, tuning, work, int(gib * GIB), **asked)


def test_as_many_work_side_by_side_as_fit():
    """Each has activations and gradients of its own; the weights and the optimizer are shared."""
    alone = fitting.choose(small_on_a_cpu(16))
    two = fitting.choose(small_on_a_cpu(16, workers=2))
    assert alone and two
    assert (alone.workers, two.workers) == (1, 2)
    assert two.micro_batch_tokens == fitting.WORKER_TOKENS < alone.micro_batch_tokens
    each = fitting.choose(small_on_a_cpu(16, micro_batch_tokens=two.micro_batch_tokens))
    assert each
    for name, size in two.prediction.parts.items():
        shared = name in ("weights", "adapter", "optimizer")
        assert size == each.prediction.parts[name] * (1 if shared else 2), name
    little = fitting.device_bytes(SMOLLM2, small_on_a_cpu(1).tuning, alone.prediction) / GIB
    some = fitting.choose(small_on_a_cpu(little, workers=4))
    assert some and some.workers < 4
    least = fitting.smallest(small_on_a_cpu(16, workers=4))
    assert least.workers == 1


CANNOT_FIT = {
    "all set by the user": request(14, micro_batch_tokens=4096, gradient_checkpointing=False),
    "a quarter of what nf4 without double quantization needs": request(7, Tuning("nf4", ADAPTER)),
    "bf16 on 16 GiB": request(16, Tuning("bf16", ADAPTER)),
    "fp32 on 16 GiB": request(16, Tuning("fp32", ADAPTER)),
    "int8 on 10 GiB": request(10, Tuning("int8", ADAPTER)),
    "all weights": request(80, Tuning("bf16", None), instead_of_full=ADAPTER),
    "short of a little": request(14, micro_batch_tokens=2048, gradient_checkpointing=False),
}


@pytest.mark.parametrize("name", CANNOT_FIT)
def test_each_advice_of_a_refusal_is_true(name):
    asked = CANNOT_FIT[name]
    assert fitting.choose(asked) is None
    changes = refusal.changes(asked)
    assert 1 <= len(changes) <= 3
    for change in changes:
        choice = fitting.choose(change.request)
        assert choice, change.words
        tuning = replace(
            change.request.tuning, gradient_checkpointing=choice.gradient_checkpointing
        )
        model, total = change.request.model, asked.total_bytes
        assert fitting.device_bytes(model, tuning, choice.prediction) <= total


def test_advice_begins_with_what_changes_no_result():
    asked = CANNOT_FIT["all set by the user"]
    assert refusal.changes(asked)[0].words.startswith("gradient checkpointing on")
    small = request(20, micro_batch_tokens=4096, gradient_checkpointing=False)
    small = replace(small, workload=small.workload.cut(512))
    assert refusal.changes(small)[0].words == "QLORA_MICRO_BATCH_TOKENS 4096 → 2048"
    bf16 = [change.words for change in refusal.changes(CANNOT_FIT["bf16 on 16 GiB"])]
    assert "quantize.precision int8" in bf16 or "quantize.precision nf4" in bf16


def test_a_refusal_is_one_line_with_parts_need_and_budget():
    line = refusal.refusal(CANNOT_FIT["bf16 on 16 GiB"])
    assert "\n" not in line
    assert line.startswith("training needs ")
    assert "weights 14.96" in line
    assert "expected at most 16.00 GiB; to make it fit: " in line


def test_what_no_change_can_help_is_told_so():
    line = refusal.refusal(request(1))
    assert "take a smaller model or another device" in line


def test_the_default_fits_a_laptop_without_checkpointing():
    adapter = adapter_of(SMOLLM2.tensors, rank=16)
    work = workload.of_counts(longest=512, batch_size=8, supervised_share=0.4)
    tuning = Tuning("nf4", adapter, double_quant=True, device="cpu")
    choice = fitting.choose(Request(SMOLLM2, tuning, work, 8 * GIB))
    assert choice
    assert (choice.micro_batch_tokens, choice.gradient_checkpointing) == (1024, False)


def test_scoring_larger_micro_batches_than_are_trained_counts_too():
    asked = request(16, micro_batch_tokens=256, gradient_checkpointing=True)
    asked = replace(asked, workload=asked.workload.cut(256))
    alone = fitting.smallest(asked).prediction
    scored = fitting.smallest(replace(asked, scored=frozenset({MicroBatch(1024, 1000)}))).prediction
    assert scored.instant == "evaluation, loss"
    assert scored.total_bytes - alone.total_bytes > 1e8  # 1.03 GB of logits, no gradients


def test_the_budget_goes_before_the_machines_memory():
    assert total_memory_bytes("cpu", 3.5) == 3.5 * GIB
    pages = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert abs(total_memory_bytes("cpu") / pages - 1) < 0.01


def test_on_a_cpu_a_quarter_of_what_comes_and_goes_is_allowed_for_the_heap() -> None:
    prediction = Prediction(
        {"weights": 1000, "activations": 300, "logits": 80, "workspace": 20}, "loss", True, 1400
    )
    tuning = replace(QLORA, device="cpu")
    assert (
        fitting.device_bytes(LLAMA, tuning, prediction)
        == 1400 + 100 + fitting.RESERVED_BYTES["cpu"]
    )
