"""The plan as people meet it: the stage, the command line, the pictures."""

import argparse
import json
import math
import shutil

import pytest

from stages.plan import __main__ as stage
from stages.plan import calibration, figures, growth, here, named, picture, table
from stages.shared.core.errors import UserError
from stages.shared.step.adapter_sizes import of_parameters
from stages.shared.tuning import Tuning
from tests import tiny, workspace
from tests.plan.cases import DATA, SMOLLM2, settings, shipped


def drawn(path, model):
    values = settings()
    plan = figures.plan(model, DATA, values)
    panels = growth.of_model(model, of_parameters(model.tensors, values.lora), 0.5)
    picture.draw(plan["techniques"], panels, plan["micro_batch"]["tokens"], path)
    return path.read_text()


def test_the_picture_is_the_same_bytes_twice(tmp_path):
    text = drawn(tmp_path / "one.svg", SMOLLM2)
    assert text == drawn(tmp_path / "two.svg", SMOLLM2)
    assert "qlora_nf4_double" in text
    assert "(the smallest card, T4 with 16 GiB, is out of sight)" in text
    assert all(one in text for one in ("32k", "rank, at 2,048 tokens", "QLoRA nf4, checkpointed"))


def test_cards_stand_as_lines_where_the_model_is_large_enough(tmp_path):
    text = drawn(tmp_path / "plan.svg", shipped("Llama-3-8B"))
    assert all(card in text for card in ("T4 16 GiB", "RTX 3090 / RTX 4090 24", "A100 / H100 80"))
    assert "uncalibrated" not in text


def test_a_bar_that_is_not_calibrated_says_so(tmp_path):
    assert "uncalibrated" in drawn(tmp_path / "plan.svg", shipped("Mixtral-8x7B"))
    assert "uncalibrated" in table.techniques(
        figures.plan(shipped("Mixtral-8x7B"), DATA, settings())
    )


def test_checkpointing_grows_slower_with_length_than_keeping_everything():
    adapter = of_parameters(SMOLLM2.tensors, settings().lora)
    by_length = growth.of_model(SMOLLM2, adapter, 0.5)[0]
    kept, checkpointed = (by_length.peaks[f"QLoRA nf4{end}"] for end in ("", ", checkpointed"))
    assert kept == sorted(kept)
    assert kept[-1] - kept[0] > 2 * (checkpointed[-1] - checkpointed[0])


def test_the_terminal_table_has_a_line_a_technique():
    lines = table.techniques(figures.plan(SMOLLM2, DATA, settings())).splitlines()
    assert lines[0].startswith("peak, MB, 1,920 tokens")
    assert lines[1].split()[:4] == ["configured", "131.23", "19.54", "39.08"]
    assert lines[1].count("✓") == 6


@pytest.mark.parametrize("name", ["folder", "file", "shipped"])
def test_a_model_is_named_by_folder_by_file_or_by_a_shipped_name(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    given = {"folder": tmp_path, "file": tmp_path / "config.json", "shipped": "Llama-3-8B"}[name]
    assert named.config_path(str(given)).is_file()
    assert named.config_path(None) == named.BASE


def test_a_model_that_is_not_there_is_told_with_those_that_are(tmp_path):
    with pytest.raises(UserError, match=r"--model is '.*none'; expected .*Llama-3-8B"):
        named.config_path(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("budget", 0.0),
        ("budget", -3.0),
        ("budget", math.inf),
        ("budget", math.nan),
        ("max_length", 1),
        ("max_length", 10**23),
    ],
)
def test_a_number_that_nothing_has_is_refused(option, value):
    options = argparse.Namespace(**{"budget": None, "max_length": None, option: value})
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} is .*; expected"):
        stage.check(options)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    space = workspace.make(tmp_path_factory.mktemp("plan"))
    tiny.save(space.root / "models/base")
    (space.root / "reports").mkdir(exist_ok=True)
    counts = {"conversations": 24, "tokens": 960, "supervised_tokens": 480, "longest_tokens": 60}
    (space.root / "reports/prepare.json").write_text(json.dumps({"train": counts}))
    result = space.stage("plan", env={"DVC_STAGE": "plan"})
    return space, result


def test_the_stage_writes_its_outs_and_under_dvc_nothing_is_said_of_this_machine(ran):
    space, result = ran
    assert result.returncode == 0, result.stderr
    assert "this machine" not in result.stdout
    plan = json.loads((space.root / "reports/plan.json").read_text())
    assert plan["model"]["parameters"] == sum(p.numel() for p in tiny.model().parameters())
    assert (space.root / "reports/plan.svg").is_file()


def test_by_hand_it_tells_what_this_machine_fits_and_writes_the_very_same_outs(ran):
    space, _ = ran
    before = [(space.root / f"reports/plan.{end}").read_bytes() for end in ("json", "svg")]
    result = space.stage("plan", env={"QLORA_MEMORY_BUDGET": "3", "QLORA_DEVICE": "cpu"})
    assert result.returncode == 0, result.stderr
    assert "this machine (cpu, 3.0 GiB)" in result.stdout
    assert "operations a second" in result.stdout
    assert "  fits: full_fp32, full_mixed" in result.stdout
    assert before == [(space.root / f"reports/plan.{e}").read_bytes() for e in ("json", "svg")]


def test_a_named_model_that_cannot_fit_is_refused_with_what_would_help_and_nothing_is_written(ran):
    space, _ = ran
    shutil.rmtree(space.root / "reports")
    command = ("--model", "Llama-3-70B", "--budget", "30", "--max-length", "2048")
    result = space.stage("plan", *command, env={"QLORA_DEVICE": "cpu"})
    assert result.returncode == 0, result.stderr
    assert "expected at most 30.00 GiB" in result.stdout
    assert "  does not fit: full_fp32, full_mixed" in result.stdout
    assert not (space.root / "reports").exists()


def test_twice_the_model_takes_twice_the_time():
    tuning = Tuning("nf4", of_parameters(SMOLLM2.tensors, settings().lora))
    once = here.epoch_seconds(SMOLLM2, tuning, DATA, 1e12)
    assert here.epoch_seconds(SMOLLM2, tuning, DATA, 5e11) == 2 * once


def test_the_calibration_measures_a_positive_rate_on_a_block_of_the_model(tmp_path):
    import torch

    tiny.model().config.save_pretrained(tmp_path)
    tuning = Tuning("nf4", None, compute="bf16", device="cpu")
    rate = calibration.operations_per_second(tmp_path / "config.json", tuning, torch.device("cpu"))
    assert 1e6 < rate < 1e16
