"""What the training benchmark makes of its steps: the bound, ratios, tables and a picture."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from benchmarks import matrix_rate, page, training, training_picture, training_table
from benchmarks.training_figures import Comparison, Tried, best, better_mode, middle, spread
from stages.shared import precision
from stages.shared.architecture import model_of
from stages.shared.core import files
from tests import tiny
from tests.workspace import ROOT

CPU = torch.device("cpu")


def step(seconds=2.0, rate=4e11, **more):
    figures = {"tokens": 100, "supervised_tokens": 60, "computed_tokens": 100, "loss": 2.0}
    return {"seconds": seconds, "matrix_rate": rate, "peak_bytes": 10**9, **figures, **more}


def comparison(*rounds, micro_batch=4, allocator="stock"):
    packed = None if micro_batch else 256
    before = {"ours": 10**8, "peer": 2 * 10**8}
    made = [{"ours": a, "peer": b, "bound_operations": 2e11} for a, b in rounds]
    resolved = {
        "micro_batch_tokens": 1024,
        "gradient_checkpointing": False,
        "unfused_because": None,
        "workers": 2,
    }
    return Comparison("tiny", allocator, micro_batch, packed, before, resolved, made)


def test_the_bound_counts_every_frozen_product_of_a_model():
    model = tiny.model()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    head = model.get_output_embeddings()
    tokens, supervised = 70, 30
    by_hand = sum(
        2 * 2 * m.in_features * m.out_features * (supervised if m is head else tokens)
        for m in linear
    )
    assert matrix_rate.bound_operations(model_of(model), tokens, supervised) == by_hand


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_probe_counts_the_products_that_it_does(monkeypatch, dtype):
    """In what training computes in here: fp32 on a CPU without products of bf16."""
    monkeypatch.setattr(precision, "multiplies_bf16", lambda kind: dtype == torch.bfloat16)
    monkeypatch.setitem(matrix_rate.SHAPES, "cpu", (128, 64, 64))
    matrix_rate._factors.cache_clear()
    done = []
    mm = torch.mm

    def counted(a, b, out):
        done.append((a, b))
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    clock = iter((10.0, 10.5))
    monkeypatch.setattr(matrix_rate.time, "perf_counter", lambda: next(clock))
    rate = matrix_rate.probe(CPU)
    (rows, inner), (_, columns) = done[0][0].shape, done[0][1].shape
    matrix_rate._factors.cache_clear()
    assert done[0][0].dtype == dtype
    assert rate == 2 * rows * inner * columns * (len(done) - 1) / 0.5  # one to warm up


def test_other_work_or_another_first_loss_ends_the_benchmark():
    same = comparison((step(), step(loss=2.015)))
    training.require_same_work(same)
    for other in (step(loss=2.05), step(tokens=99), step(supervised_tokens=61)):
        with pytest.raises(SystemExit, match="tiny, stock allocator, trl unpacked"):
            training.require_same_work(comparison((step(), other)))


def test_the_warm_up_is_left_out_and_a_ratio_is_of_a_pair():
    one = comparison(
        (step(50.0), step(1.0)),
        (step(1.0), step(2.0)),
        (step(2.0), step(6.0)),
        (step(4.0), step(16.0)),
    )
    assert one.ratio == pytest.approx((2.5, 3.0, 3.5))
    assert one.tokens_per_second("ours").median == 50
    assert one.share_of_bound("ours").median == pytest.approx(2e11 / 4e11 / 2.0)


def test_at_one_matrix_rate_a_faster_spell_is_no_merit():
    one = comparison((step(), step()), (step(1.0, rate=8e11), step(2.0, rate=4e11)))
    assert one.ratio.median == 2
    assert one.ratio_at_one_rate.median == 1


def test_the_best_micro_batch_is_the_fastest_for_its_matrix_rate():
    tried = [
        Tried("tiny", 1, step(1.0, rate=2e12)),
        Tried("tiny", 2, step(1.5, rate=4e11)),
        Tried("other", 8, step(0.1, rate=4e11)),
    ]
    assert best(tried, "tiny") == 2


def test_a_micro_batch_is_judged_by_its_middle_step():
    steps = (step(2.0, rate=4e11), step(2.0, rate=2e11), step(2.1, rate=4e11))  # one spoiled probe
    assert middle(Tried("tiny", 1, one) for one in steps).step == steps[0]


def test_the_better_mode_is_the_one_in_which_the_peer_is_faster():
    slow = comparison((step(), step()), (step(), step(4.0)))
    fast = comparison((step(), step()), (step(), step(3.0)), micro_batch=None)
    assert better_mode([slow, fast], "tiny", "stock") is fast
    said = training_table.goals([slow, fast])
    assert "trl packed: 1.50 times its tokens a second (not reached), 1.00 of its memory" in said


def test_what_was_aimed_at_is_said_to_be_reached_only_where_it_is():
    far = comparison((step(), step()), (step(0.5, peak_bytes=10**8), step(2.0)))
    light = comparison((step(), step(peak_bytes=10**10)), (step(0.5), step(1.5)))
    assert training_table.goals([far]).count("(reached)") == 2  # its first step needed as much
    assert training_table.goals([light]).count("(reached)") == 3
    assert training_table.goals([comparison(*[(step(), step())] * 2)]).count("(not reached)") == 3


def test_quartiles():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)


def results():
    one = comparison((step(), step()), (step(), step(5.0, computed_tokens=125)))
    return {
        "trl": "1.0",
        "computed_in": "fp32",
        "environment": {
            "device": "a processor",
            "threads": 2,
            "versions": dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1"),
        },
        "tried": [dataclasses.asdict(Tried("tiny", 4, step()))],
        "compared": [dataclasses.asdict(one)],
    }


def test_the_tables_are_made_of_the_committed_figures_alone():
    found = json.loads(json.dumps(results()))
    text = training_table.text(found)
    assert "| tiny | stock | unpacked, 4 at once (20% padding) | 50 | 20 | **2.50**" in text
    assert "| 1.00 (0.10 before) | 1.00 (0.20 before) | 1.00 | 1 |" in text
    assert "Ours: micro-batches of 1,024 tokens, not checkpointed, fused, 2 side by side." in text
    assert "| tiny | 4 | 50 | 400 | 1.00 |" in text


def test_the_picture_names_each_comparison(tmp_path):
    _, compared = training_table.read(results())
    training_picture.draw(compared, tmp_path / "performance.svg")
    assert "tiny, stock" in (tmp_path / "performance.svg").read_text()


def test_a_table_stands_between_its_marks_or_nothing_is_written(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n")
    page.put("a", "new", path)
    assert path.read_text() == "before\n<!-- a -->\nnew\n<!-- end of a -->\nafter\n"
    with pytest.raises(ValueError, match="end of b"):
        page.put("b", "new", path)


@pytest.mark.parametrize("place", training_table.PLACES.values(), ids=training_table.PLACES)
def test_the_page_says_what_was_measured(place):
    if not (ROOT / place.results).exists():
        pytest.skip("the benchmark has not been run yet")
    text = training_table.text(files.read_json(ROOT / place.results))
    assert text in (ROOT / page.PAGE).read_text(encoding="utf-8")
