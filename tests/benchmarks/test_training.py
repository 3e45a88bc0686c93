"""The training benchmark: what it measures, what it makes of it, and what it refuses."""

import dataclasses
import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import (
    matrix_rate,
    page,
    resident,
    training,
    training_data,
    training_ours,
    training_picture,
    training_table,
)
from benchmarks.paced import Channel, Worker
from benchmarks.training_figures import Comparison, Tried, best, better_mode, middle, spread
from stages.shared import files, models, scoring
from stages.shared.architecture import model_of
from stages.shared.errors import run
from stages.shared.examples import read_examples
from tests import tiny
from tests.workspace import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny quantized model, its tokenizer and conversations, described as to the workers."""
    work = tmp_path_factory.mktemp("work")
    model = tiny.quantize(work / "quantized", "nf4")
    data = tiny.prepared(work / "prepared", conversations=40)
    return training_data.inputs_of("tiny", data, model, work / "base")


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


# What bounds a step


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


def test_the_probe_counts_the_products_that_it_does(monkeypatch):
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
    assert done[0][0].dtype == torch.bfloat16
    assert rate == 2 * rows * inner * columns * (len(done) - 1) / 0.5  # one to warm up


# Two processes that take steps when they are told to


def test_a_worker_answers_step_by_step_whatever_it_prints():
    with Worker("tests.benchmarks.echo", {"number": 3}) as worker:
        assert worker.found == {"number": 3}
        assert [worker.ask()["number"] for _ in range(3)] == [6, 12, 24]
    assert worker._process.returncode == 0


def test_a_worker_that_fails_ends_the_benchmark_and_says_why():
    with (
        pytest.raises(SystemExit, match=r"as it was told to\n(.|\n)*error: python -m tests.bench"),
        Worker("tests.benchmarks.echo", {"number": 3}) as worker,
    ):
        worker.ask("fail")


def test_a_worker_has_the_allocator_that_is_preloaded():
    environment = training.allocators()
    assert environment["stock"] == {"LD_PRELOAD": "", "QLORA_DEVICE": "cpu"}
    if "jemalloc" not in environment:
        pytest.skip("no libjemalloc on this machine")
    maps = "print(open('/proc/self/maps').read())"
    shown = subprocess.run(
        [sys.executable, "-c", maps],
        env=environment["jemalloc"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "jemalloc" in shown.stdout


def test_the_peak_is_forgotten_before_the_first_step():
    held = np.ones(50_000_000)
    del held
    high = resident.peak_bytes(CPU)
    resident.forget_peak(CPU)
    assert resident.peak_bytes(CPU) < high - 300_000_000


def test_our_worker_takes_the_steps_that_are_given_and_learns_from_them(inputs):
    examples = read_examples(Path(inputs.job["data"]) / "train.parquet")
    steps = [[5, 1, 7], [0, 2]]
    with Worker(training.OURS, inputs.job | {"steps": steps}) as worker:
        first, second = worker.ask(), worker.ask()
    for rows, found in zip(steps, (first, second), strict=True):
        assert found["tokens"] == sum(len(examples[row]) for row in rows)
        assert found["supervised_tokens"] == sum(examples[row].supervised_tokens for row in rows)
        assert found["seconds"] > 0 and found["matrix_rate"] > 0
    assert first["loss"] == pytest.approx(untrained_loss(inputs, examples, steps[0]), rel=1e-3)
    assert second["loss"] < untrained_loss(inputs, examples, steps[1])
    assert worker.found["before_bytes"] < first["peak_bytes"] <= second["peak_bytes"]


def untrained_loss(inputs, examples, rows):
    model = models.load_model(Path(inputs.job["model"]), CPU)
    chosen = [dataclasses.replace(examples[row], row=i) for i, row in enumerate(rows)]
    return scoring.mean_loss(*scoring.score(model, chosen, CPU, torch.bfloat16, "score"))


def test_the_loop_is_trainings_own_with_its_settings():
    settings = training_data.training_params(lora__r=4, train__batch_size=3)
    assert (settings.lora.r, settings.train.batch_size) == (4, 3)
    assert settings.train.scheduler == "constant"
    given = training_ours.Given(10, 3, 1, None, 0, ((9, 8), (1,)))
    assert [given.drawn(0), given.drawn(1)] == [[9, 8], [1]]


# The peer, where it is installed


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="trl is a dependency of the benchmark only")


@pytest.mark.parametrize("micro_batch", [2, None], ids=["unpacked", "packed"])
def test_both_learn_from_the_same_tokens_and_begin_at_the_same_loss(
    trl, inputs, micro_batch, monkeypatch
):
    monkeypatch.setattr(training, "ROUNDS", 3)
    done = training.compare(inputs, "stock", {"LD_PRELOAD": ""}, micro_batch, deadline=0.0)
    assert len(done.rounds) == 3  # as few as may be, since the deadline is over
    for one in done.rounds:
        assert one["ours"]["tokens"] == one["peer"]["tokens"]
        assert one["ours"]["supervised_tokens"] == one["peer"]["supervised_tokens"]
    assert done.rounds[0]["ours"]["loss"] == pytest.approx(done.rounds[0]["peer"]["loss"], rel=0.01)
    assert (done.padding == 0) == (done.mode == "packed")


def test_the_peer_runs_without_what_we_set_for_ourselves(trl):
    """`stages.shared.models` sets up libraries before they are loaded: for ours alone."""
    look = "import sys, benchmarks.training_trl; print('stages.shared.models' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize("packed", [False, True])
def test_the_peer_says_which_rows_each_of_its_steps_holds(trl, inputs, packed, tmp_path):
    from benchmarks import trl_trainer

    settings = training_data.training_params()
    examples = read_examples(Path(inputs.job["data"]) / "train.parquet")
    job = training.peer_job(inputs, None if packed else 4)
    model = tiny.model()
    trainer = trl_trainer.make_trainer(
        model, tiny.tokenizer(), settings, job, examples, str(tmp_path)
    )
    steps = trl_trainer.rows_of_steps(trainer, examples)
    drawn = trl_trainer.Steps.of(settings.train, len(examples))
    wanted = [drawn.drawn(step) for step in range(inputs.job["steps"])]
    assert sorted(chain(*steps)) == sorted(chain(*wanted))
    assert (steps == wanted) == (not packed)
    if packed:
        assert all(sum(len(examples[r]) for r in rows) <= inputs.tokens for rows in steps)


def test_the_peer_stops_where_it_would_learn_from_other_tokens(trl, inputs):
    from benchmarks import training_trl

    class ToldError(Exception):
        pass

    class Mute(Channel):
        def __init__(self):
            pass

        def hear(self):
            pass

        def tell(self, answer):
            raise ToldError

    trainer = type("Trainer", (), {})()
    paced = training_trl.Paced(Mute(), trainer, [60])
    args = type("Args", (), {"device": CPU})
    state = type("State", (), {"global_step": 1})
    for counted, expected in ((60, ToldError), (59, AssertionError)):
        paced.on_step_begin(args, state, None)
        trainer.counted["supervised_tokens"] = counted
        with pytest.raises(expected):
            paced.on_step_end(args, state, None)


# What is made of it


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


def test_the_page_says_what_was_measured():
    if not (ROOT / training_table.RESULTS).exists():
        pytest.skip("the benchmark has not been run yet")
    text = training_table.text(files.read_json(ROOT / training_table.RESULTS))
    assert text in (ROOT / page.PAGE).read_text(encoding="utf-8")


# What it is measured on


def test_the_conversations_are_prepared_as_the_pipeline_does(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "source.jsonl"
    text = "### Human: Count to {0}.### Assistant: {1}"
    rows = [{"text": text.format(n, " and ".join(map(str, range(n))))} for n in range(1, 200)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = training_data.prepared(source, tmp_path / "tokenizer", tmp_path / "work")
    lengths = [len(example) for example in read_examples(folder / "train.parquet")]
    assert max(lengths) == training_data.MAX_LENGTH
    described = training_data.inputs_of("tiny", folder, tmp_path, tmp_path)
    assert described.tokens == round(described.job["batch_size"] * np.mean(lengths))
    assert described.job["steps"] == min(training_data.STEPS, len(lengths) // 8)


def test_without_a_model_it_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training", "--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        run(training.main)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "dvc repro" in line
