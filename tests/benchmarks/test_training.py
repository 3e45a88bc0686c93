"""The training benchmark's two processes: what each is given, computes and tells."""

import dataclasses
import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import resident, training, training_data, training_ours
from benchmarks.paced import Channel, Worker
from stages.shared import models, scoring
from stages.shared.core.errors import run
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


@pytest.mark.parametrize(
    ("seconds", "expected"), [((9, 6, 5, 8), [1, 2, 4, 8]), ((5, 5.2, 7, 4), [1, 2, 4])]
)
def test_sizes_are_tried_until_one_is_clearly_slower(inputs, monkeypatch, seconds, expected):
    monkeypatch.setattr(training, "PEER", "tests.benchmarks.timed")
    taken = dict(zip(training.MICRO_BATCHES, seconds, strict=True))
    job = {**inputs.job, "seconds": taken}
    tried = training.try_micro_batches(dataclasses.replace(inputs, job=job), {})
    assert [one.micro_batch for one in tried] == expected


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
    return scoring.mean_loss(*scoring.score(model, chosen, CPU, model.dtype, "score"))


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
