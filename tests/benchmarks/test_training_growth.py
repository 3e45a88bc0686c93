"""How cost grows: the points that are measured, and the powers that are fitted to them."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import growth, growth_table, page
from benchmarks.growth import Job
from benchmarks.growth_table import Point
from stages.shared.core import files
from tests import tiny
from tests.workspace import ROOT

SHAPE = growth.llama(hidden=64, inner=128, layers=2, heads=4, key_value_heads=2)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    return tiny.quantize(tmp_path_factory.mktemp("models") / "quantized", "nf4")


def point(sweep="length", value=128, seconds=1.0, rate=4e11, peak=3 * 10**9):
    step = {"input_tokens": 100, "seconds": seconds, "matrix_rate": rate, "peak_bytes": peak}
    return Point(sweep, value, 10**9, 2 * 10**11, [step | {"seconds": 60.0}, step, step, step])


@pytest.mark.parametrize("model", ["a folder", SHAPE], ids=["quantized", "random"])
def test_a_point_is_real_steps_of_the_length_and_the_rank(quantized, model, monkeypatch):
    monkeypatch.setattr(growth, "STEPS", 2)
    folder = str(quantized) if model == "a folder" else model
    found = growth.measure(Job("length", folder, 48, 4))
    assert (found.sweep, found.value) == ("length", 48)
    assert [step["input_tokens"] for step in found.steps] == [48, 48]
    assert [step["supervised_tokens"] for step in found.steps] == [24, 24]
    if model == "a folder":  # random weights this small learn too little to tell
        assert found.steps[1]["loss"] < found.steps[0]["loss"]  # the same conversation again
    linear, head = 2 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 128), 64
    vocabulary = 384 if model == "a folder" else SHAPE["vocab_size"]
    assert found.bound_operations == 4 * (linear * 48 + head * vocabulary * 24)
    assert found.peak_bytes >= found.before_bytes > 0


def test_length_rank_and_size_grow_one_at_a_time(quantized):
    jobs = growth.jobs(Path(quantized))
    sweeps = {s: [job for job in jobs if job.sweep == s] for s in growth_table.SWEEPS}
    assert [job.value for job in sweeps["length"]] == [128, 256, 512, 1024, 2048, 4096]
    assert [job.value for job in sweeps["rank"]] == [4, 16, 64, 256]
    sizes = [job.value for job in sweeps["parameters"]]
    assert sizes == sorted(sizes) and len(sizes) == 4
    assert 1.0e9 < sizes[-1] < 1.1e9
    for jobs_ in sweeps.values():
        others = {
            (str(job.model) if jobs_ is not sweeps["parameters"] else "")
            + (str(job.length) if jobs_ is not sweeps["length"] else "")
            + (str(job.rank) if jobs_ is not sweeps["rank"] else "")
            for job in jobs_
        }
        assert len(others) == 1


def test_the_fitted_power_is_that_of_a_power_law():
    values = [128, 512, 2048]
    assert growth_table.exponent(values, [3 * v**1.5 for v in values]) == pytest.approx(1.5)


def test_a_faster_spell_of_the_machine_does_not_look_like_a_cheaper_step():
    slow, fast = point(seconds=2.0, rate=4e11), point(seconds=1.0, rate=8e11)
    assert slow.tokens_per_operation == fast.tokens_per_operation
    assert slow.share_of_bound == fast.share_of_bound == pytest.approx(0.25)


def test_the_first_step_is_left_out_of_the_speed():
    two = dataclasses.replace(point(seconds=1.0), steps=point(seconds=1.0).steps[:2])
    assert two.tokens_per_operation == pytest.approx(100 / 4e11)


def results():
    return {
        "environment": {"device": "a processor", "threads": 2},
        "points": [
            dataclasses.asdict(one)
            for one in (
                point("length", 128),
                point("length", 256, seconds=2.0, peak=5 * 10**9),
                point("rank", 4),
                point("rank", 16),
                point("parameters", 10**8),
                point("parameters", 10**9, seconds=10.0),
            )
        ],
    }


def test_the_table_has_a_line_a_point_and_the_powers():
    text = growth_table.text(results())
    assert "| tokens of the conversation | 256 | 50 | 25% | 5.00 | 4.00 |" in text
    length, rank, size = [line for line in text.splitlines() if "power" in line]
    assert "**-1.00**" in length and "**+0.74**" in length and "**+1.00**" in length
    assert rank.count("0.00**") == 3
    assert "**-1.00**" in size


def test_the_picture_names_what_grows(tmp_path):
    growth_table.draw(results(), tmp_path / "growth.svg")
    drawn = (tmp_path / "growth.svg").read_text()
    assert all(label in drawn for label in growth_table.SWEEPS.values())


def test_the_page_says_what_was_measured():
    if not (ROOT / growth_table.RESULTS).exists():
        pytest.skip("the benchmark has not been run yet")
    text = growth_table.text(files.read_json(ROOT / growth_table.RESULTS))
    assert text in (ROOT / page.PAGE).read_text(encoding="utf-8")
