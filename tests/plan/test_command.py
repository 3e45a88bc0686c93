"""The plan as people meet it: the stage, the command line, the picture."""

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from stages.plan import __main__ as stage
from stages.plan import config, figures, output, this_machine
from stages.shared.core.errors import UserError
from stages.shared.step.memory.predict import StepCounter
from tests import hub as hubs
from tests import tiny, workspace
from tests.hub import COMMIT
from tests.plan.cases import DATA, settings, written


def drawn(path_of_config: Path, path: Path) -> str:
    values = settings()
    with StepCounter(path_of_config) as counter:
        plan = figures.plan(counter, DATA, values)
        growth = figures.growth(counter, values, DATA)
    output.draw(plan, growth, path)
    assert all(peaks == sorted(peaks) for peaks in growth.values())
    return path.read_text()


def test_picture_is_the_same_bytes_and_says_what_fits(tmp_path: Path) -> None:
    model = written(tmp_path)
    text = drawn(model, tmp_path / "one.svg")
    assert text == drawn(model, tmp_path / "two.svg")
    assert "fits 16 GiB" in text
    assert "(the smallest card, 16 GiB, is out of sight)" in text
    assert all(one in text for one in ("32,768", "QLoRA nf4, checkpointed", "≤"))


def test_picture_of_a_large_model_has_lines_of_cards(tmp_path: Path) -> None:
    text = drawn(config.CONFIGS / "Llama-3-8B.json", tmp_path / "plan.svg")
    assert all(f">{gib} GiB<" in text for gib in (16, 24, 80))


@pytest.mark.parametrize("name", ["folder", "file", "shipped"])
def test_model_is_named_by_folder_file_or_shipped_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    given = {"folder": tmp_path, "file": tmp_path / "config.json", "shipped": "Llama-3-8B"}[name]
    assert config.config_path(str(given)).is_file()
    assert config.config_path(None) == config.BASE


@pytest.mark.parametrize(("suffix", "said"), [("", "main"), (f"@{COMMIT}", "pinned")])
def test_model_of_the_hub_is_one_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    said: str,
) -> None:
    with hubs.serve_here(monkeypatch, tmp_path) as hub:
        hub.repositories["me/tiny"] = {"config.json": b"{}", "model.safetensors": b"large"}
        assert config.config_path(f"me/tiny{suffix}").read_text() == "{}"
        with pytest.raises(UserError, match=r"me/none"):
            config.config_path("me/none")
    assert capsys.readouterr().out.startswith(f"me/tiny at {COMMIT} ({said})\n")
    got = [path for path, _ in hub.requests if path.startswith("GET ") and "me/tiny" in path]
    assert got and all(path.endswith("/config.json") for path in got)


def test_model_that_is_missing_is_told_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model: '.*none' .*Llama-3-8B"):
        config.config_path(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("budget", 0.0),
        ("budget", math.inf),
        ("budget", math.nan),
        ("max_length", 1),
        ("max_length", 10**23),
        ("devices", 0),
    ],
)
def test_number_that_nothing_has_is_refused(option: str, value: float) -> None:
    options = Namespace(**{"budget": None, "max_length": None, "devices": None, option: value})
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')}: is .* Give"):
        stage.check(options)


def test_set_changes_a_parameter_for_this_plan() -> None:
    values = config.changed(settings(), ["lora.r=64", "quantize.precision=bf16", "lora.bias=all"])
    assert (values.lora.r, values.quantize.precision, values.lora.bias) == (64, "bf16", "all")
    for setting, reason in (
        ("lora.rank=64", "lora.r, "),
        ("lora.r", "is no parameter"),
        ("merge.dtype=fp16", "is no parameter"),
        ("lora.r=many", "lora.r is the text 'many'"),
        ("lora.r={", "no value of YAML"),
    ):
        with pytest.raises(UserError, match=reason):
            config.changed(settings(), [setting])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory):
    space = workspace.make(tmp_path_factory.mktemp("plan"))
    tiny.save(space.root / "models/base")
    (space.root / "reports").mkdir(exist_ok=True)
    counts = {"conversations": 24, "tokens": 960, "supervised_tokens": 480, "longest_tokens": 60}
    (space.root / "reports/prepare.json").write_text(json.dumps({"train": counts}))
    result = space.stage("plan", env={"DVC_STAGE": "plan"})
    return space, result


def test_stage_says_nothing_of_this_machine(ran) -> None:
    space, result = ran
    assert result.returncode == 0, result.stderr
    assert "this machine" not in result.stdout
    plan = json.loads((space.root / "reports/plan.json").read_text())
    assert plan["model"]["parameters"] == sum(p.numel() for p in tiny.model().parameters())
    assert (space.root / "reports/plan.svg").is_file()


def test_command_says_what_fits_here_and_writes_the_same(ran) -> None:
    space, _ = ran
    before = [(space.root / f"reports/plan.{end}").read_bytes() for end in ("json", "svg")]
    result = space.stage("plan", env={"QLORA_MEMORY_BUDGET": "3", "QLORA_DEVICE": "cpu"})
    assert result.returncode == 0, result.stderr
    assert "this machine (cpu, 3.0 GiB)" in result.stdout
    assert "operations a second" in result.stdout
    assert "  fits: full_fp32, full_mixed" in result.stdout
    assert before == [(space.root / f"reports/plan.{e}").read_bytes() for e in ("json", "svg")]


def test_model_that_cannot_fit_is_refused_and_writes_nothing(ran) -> None:
    space, _ = ran
    shutil.rmtree(space.root / "reports")
    command = ("--model", "Llama-3-70B", "--budget", "30", "--max-length", "2048")
    result = space.stage("plan", *command, "--set", "lora.r=64", env={"QLORA_DEVICE": "cpu"})
    assert result.returncode == 0, result.stderr
    assert "there are 30.00. Take a smaller model" in result.stdout
    assert not (space.root / "reports").exists()


def test_calibration_measures_a_positive_rate(tmp_path: Path) -> None:
    tiny.model().config.save_pretrained(tmp_path)
    setup = figures.configured(settings(), "cpu")
    with StepCounter(tmp_path / "config.json") as counter:
        rate = this_machine.operations_per_second(counter, setup, torch.device("cpu"))
    assert 1e6 < rate < 1e16
