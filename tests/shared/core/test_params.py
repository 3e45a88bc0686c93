"""A mistake in params.yaml ends in one line that says what, where, and what to do."""

import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.evaluate.config import Params as EvaluateParams
from stages.merge.config import Params as MergeParams
from stages.plan.config import Params as PlanParams
from stages.shared.core import params
from stages.shared.core.errors import UserError
from stages.train.config import Params as TrainParams
from tests import workspace

DEFAULTS = yaml.safe_load((Path(__file__).parents[3] / "params.yaml").read_text())


def mistake(schema: type[params.Section], section: str, **changes: Any) -> str:
    values = {name: dict(DEFAULTS[name]) for name in schema.model_fields}
    values[section].update(changes)
    values[section] = {k: v for k, v in values[section].items() if v != "REMOVED"}
    with pytest.raises(UserError) as error:
        params.validate(schema, values)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_key_is_named_with_those_that_are_known() -> None:
    line = mistake(TrainParams, "lora", rank=8)
    assert line.startswith("params.yaml: lora.rank is not a parameter; expected one of r, alpha")


def test_a_missing_key_is_named() -> None:
    assert "lora.alpha is missing" in mistake(TrainParams, "lora", alpha="REMOVED")


@pytest.mark.parametrize(
    ("schema", "section", "key", "value", "expected"),
    [
        (TrainParams, "lora", "r", "16", "lora.r is the text '16'; expected a valid integer"),
        (TrainParams, "lora", "r", "16", "; write it without quotes"),
        (TrainParams, "lora", "alpha", math.inf, "lora.alpha is inf; expected a finite number"),
        (TrainParams, "train", "learning_rate", math.nan, "is nan; expected a finite number"),
        (TrainParams, "train", "max_grad_norm", math.nan, "is nan; expected greater than 0"),
        (TrainParams, "train", "seed", 2**63, "expected less than 9223372036854775808"),
        (TrainParams, "lora", "r", 0, "lora.r is 0; expected greater than or equal to 1"),
        (TrainParams, "lora", "dropout", 1.0, "lora.dropout is 1.0; expected less than 1"),
        (TrainParams, "train", "method", "half", "expected 'lora' or 'full'"),
        (TrainParams, "train", "epochs", 1.5, "train.epochs is 1.5; expected a valid integer"),
        (TrainParams, "train", "batch_size", True, "train.batch_size is True"),
        (MergeParams, "merge", "onto", "base", "expected 'quantized' or 'original'"),
        (EvaluateParams, "evaluate", "max_new_tokens", 0, "evaluate.max_new_tokens is 0"),
    ],
)
def test_a_wrong_value_is_shown_beside_what_was_expected(
    schema: type[params.Section], section: str, key: str, value: Any, expected: str
) -> None:
    assert expected in mistake(schema, section, **{key: value})


@pytest.mark.parametrize("key", ["learning_rate", "epochs"])
def test_a_number_in_quotes_is_explained(key: str) -> None:
    assert mistake(TrainParams, "train", **{key: "2"}).endswith("; write it without quotes")
    assert mistake(TrainParams, "train", method="2").endswith("expected 'lora' or 'full'")


def test_a_stage_sees_only_what_it_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = workspace.make(tmp_path, {"lora.r": 3})
    monkeypatch.chdir(space.root)
    assert params.load(TrainParams, "train").lora.r == 3
    with pytest.raises(UserError, match="lora is missing"):
        params.load(TrainParams, "merge")


def test_a_mistake_in_a_later_section_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = workspace.make(tmp_path, {"merge.dtype": "bf61"})
    monkeypatch.chdir(space.root)
    with pytest.raises(UserError, match=r"merge\.dtype is the text 'bf61'; expected 'fp16'"):
        params.load(TrainParams, "train")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("report: 5", "params.yaml: report is 5; expected a section with its keys"),
        ("repotr: {}", "params.yaml: repotr is not a section; expected one of evaluate, "),
        ("train: 2024-01-01", "params.yaml: train is 2024-01-01, a date. Quote a text."),
        ("a: &a [*a]", "params.yaml: a.0.0.0.0.0.0.0.0 has too many values. Look for an anchor"),
        ("a: " + 5000 * "[" + 5000 * "]", "params.yaml: is nested too deeply, or too large."),
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(f"{b}: &{b} [{9 * f'*{a},'}]\n"
         for a, b in pairwise("abcdefgh")), "has too many values. Look for an anchor"),
        ("plan: {\n", "params.yaml:72: is not YAML (expected the node content, but found"),
        ("report: {}\n\tx: 1", "is not YAML (found character '\\t' that cannot start any token)"),
        ("report: {}\nreport: {}", 'is not YAML (found duplicate key "report" with value "{}"'),
        ("report: \0", "params.yaml: is not YAML (unacceptable character #x0000"),
    ],
)  # fmt: skip
def test_any_content_of_the_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, told: str
) -> None:
    space = workspace.make(tmp_path)
    monkeypatch.chdir(space.root)
    path = space.root / "params.yaml"
    name = content.partition(":")[0]
    kept = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != name}
    path.write_text(f"{yaml.safe_dump(kept)}{content}\n")
    with pytest.raises(UserError) as error:
        params.load(PlanParams, "plan")
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_stage_ends_in_one_line_and_a_non_zero_exit(tmp_path: Path) -> None:
    space = workspace.make(tmp_path)
    path = space.root / "params.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.001", "learning_rate: '2e-4'"))
    done = space.stage("train")
    assert done.returncode == 1
    assert done.stderr.startswith("error: params.yaml: train.learning_rate is the text '2e-4'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "content", "told"),
    [
        (".dvc", None, "plan: DVC cannot read its stage here (unknown Git revision"),
        ("dvc.yaml", "stages: {plan: [", "plan: DVC cannot read its stage here (unable"),
        ("dvc.yaml", "stages: {}", "plan: DVC cannot read its stage here (Stage 'plan' not found"),
        ("dvc.lock", "schema: '2.0'\nstages: 5", "plan: DVC cannot read its stage here ('"),
        ("params.yaml", None, "params.yaml: not there. Run this at the root of a clone"),
    ],
)
def test_what_dvc_cannot_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, content: str | None, told: str
) -> None:
    space = workspace.make(tmp_path)
    monkeypatch.chdir(space.root)
    if content is not None:
        (space.root / path).write_text(content)
    elif path == ".dvc":
        shutil.rmtree(path)
    else:
        (space.root / path).unlink()
    with pytest.raises(UserError) as error:
        params.load(PlanParams, "plan")
    assert str(error.value).startswith(told) and "\n" not in str(error.value)


def test_a_stage_without_its_input_says_what_writes_it(tmp_path: Path) -> None:
    done = workspace.make(tmp_path).stage("train")
    assert done.returncode == 1
    assert done.stderr == (
        "error: data/prepared/train.parquet: not there; `dvc repro` runs the stages that write "
        "it, in order\n"
    )


def test_an_unknown_variant_is_refused(tmp_path: Path) -> None:
    done = workspace.make(tmp_path).stage("evaluate", "best")
    assert done.returncode == 1
    assert "invalid choice: 'best' (choose from 'base', 'quantized', 'adapter'" in done.stderr
