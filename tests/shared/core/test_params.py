"""A mistake in params.yaml ends in one line that says what, where, and what to do."""

import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.evaluate.inputs import Params as EvaluateParams
from stages.merge.__main__ import Params as MergeParams
from stages.plan.config import Params as PlanParams
from stages.prepare.config import Params as PrepareParams
from stages.shared.core import params
from stages.shared.core.errors import UserError
from stages.train.config import Params as TrainParams
from tests import workspace
from tests.workspace import Workspace

ECHO = {"prompt": "text", "completion": "text"}
CANNOT = "stage plan of dvc.yaml: cannot be read"
DEFAULTS = yaml.safe_load((workspace.ROOT / "params.yaml").read_text())


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    return workspace.make(tmp_path)


def refusal(stage: str = "plan", schema: type[params.Section] = PlanParams) -> str:
    with pytest.raises(UserError) as error:
        params.load(schema, stage)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("schema", "key", "value", "told"),
    [
        (TrainParams, "lora.rank", 8, "lora.rank is not a parameter; expected one of r, alpha"),
        (TrainParams, "lora.alpha", ..., "lora.alpha is missing. Every parameter has a line"),
        (TrainParams, "lora.r", "16", "is the text '16'; expected a valid integer; write it with"),
        (TrainParams, "train.learning_rate", "2", "a valid number; write it without quotes"),
        (TrainParams, "train.method", "2", "is the text '2'; expected 'lora' or 'full'"),
        (TrainParams, "lora.alpha", math.inf, "lora.alpha is inf; expected a finite number"),
        (TrainParams, "train.learning_rate", math.nan, "is nan; expected a finite number"),
        (TrainParams, "train.max_grad_norm", math.nan, "is nan; expected greater than 0"),
        (TrainParams, "train.seed", 2**63, "expected less than 9223372036854775808"),
        (TrainParams, "lora.r", 0, "lora.r is 0; expected greater than or equal to 1"),
        (TrainParams, "lora.dropout", 1.0, "lora.dropout is 1.0; expected less than 1"),
        (TrainParams, "train.epochs", 1.5, "train.epochs is 1.5; expected a valid integer"),
        (TrainParams, "train.batch_size", True, "train.batch_size is True"),
        (MergeParams, "merge.onto", "base", "expected 'quantized' or 'original'"),
        (PrepareParams, "prepare.columns", ECHO, "expected each column under one name"),
        (EvaluateParams, "evaluate.max_new_tokens", 0, "evaluate.max_new_tokens is 0"),
    ],
)
def test_a_wrong_key_or_value_is_told(
    schema: type[params.Section], key: str, value: Any, told: str
) -> None:
    section, name = key.split(".")
    values = {section: dict(DEFAULTS[section]) for section in schema.model_fields}
    values[section][name] = value
    if value is ...:
        del values[section][name]
    with pytest.raises(UserError) as error:
        params.validate(schema, values)
    assert str(error.value).startswith(f"params.yaml: {key} ") and told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_stage_sees_only_what_it_declares(space: Workspace) -> None:
    space.set_params({"lora.r": 3})
    assert params.load(TrainParams, "train").lora.r == 3
    assert "lora is missing" in refusal("merge", TrainParams)
    space.set_params({"merge.dtype": "bf61"})  # a later section, told before the training
    assert "merge.dtype is the text 'bf61'; expected 'fp16'" in refusal("train", TrainParams)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("report: 5", "params.yaml: report is 5; expected a section with its keys"),
        ("repotr: {}", "params.yaml: repotr is not a section; expected one of evaluate, "),
        ("train: 2024-01-01", "params.yaml: 2024-01-01 is a date. Quote it, if it is a text."),
        ("a: &a [*a]", "is no plain YAML (Circular reference detected)"),
        ("? [1]\n: 2", "is no plain YAML (keys must be str, int,"),
        ("a: " + 5000 * "[" + 5000 * "]", "params.yaml: is nested or expands without end."),
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(f"{b}: &{b} [{9 * f'*{a},'}]\n"
         for a, b in pairwise("abcdefg")), "is nested or expands without end."),
        ("plan: {\n", "params.yaml:72: is no plain YAML (expected the node content, but"),
        ("report: {}\n\tx: 1", "(found character '\\t' that cannot start any token)"),
        ("report: {}\nreport: {}", '(found duplicate key "report" with value "{}"'),
        ("report: \0", "params.yaml: is no plain YAML (unacceptable character #x0000"),
    ],
)  # fmt: skip
def test_any_content_of_the_file_is_one_line(space: Workspace, content: str, told: str) -> None:
    name = content.partition(":")[0]
    kept = {key: value for key, value in DEFAULTS.items() if key != name}
    (space.root / "params.yaml").write_text(f"{yaml.safe_dump(kept)}{content}\n")
    assert told in refusal()


@pytest.mark.parametrize(
    ("path", "content", "told"),
    [
        (".dvc", None, f"{CANNOT} (NotDvcRepoError: you are not"),
        ("dvc.yaml", "stages: {plan: [", f"{CANNOT} (YAMLSyntaxError: unable"),
        ("dvc.yaml", "stages: {}", f"{CANNOT} (StageNotFound: Stage 'plan' not found"),
        ("dvc.lock", "schema: '2.0'\nstages: 5", f"{CANNOT} (YAMLValidationError: '"),
        ("params.yaml", None, "params.yaml: not there. Run this at the root of a clone"),
    ],
)
def test_what_dvc_cannot_read_is_one_line(
    space: Workspace, path: str, content: str | None, told: str
) -> None:
    if content is not None:
        (space.root / path).write_text(content)
    elif path == ".dvc":
        shutil.rmtree(path)
    else:
        (space.root / path).unlink()
    assert refusal().startswith(told)


def test_a_fault_of_the_disk_is_not_dvcs(space: Workspace) -> None:
    """As in a folder that cannot be written."""
    (space.root / ".dvc/tmp").write_text("")
    with pytest.raises(OSError, match=r"\.dvc/tmp"):
        params.load(PlanParams, "plan")


def test_a_stage_ends_in_one_line_and_a_non_zero_exit(space: Workspace) -> None:
    space.set_params({"train.learning_rate": "many"})
    done = space.stage("train")
    assert done.returncode == 1
    assert done.stderr.startswith("error: params.yaml: train.learning_rate is the text 'many'")
    assert done.stderr.count("\n") == 1
