"""Everything that the report shows, read from the files that the stages before it wrote."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.shared.core.errors import UserError

PARAMETERS = Path("params.yaml")
# A link to dvc.yaml, which DVC refuses as a dependency by its own name; under this one a change of
# the pipeline draws the report again.
PIPELINE = Path("stages/report/pipeline.yaml")
PREPARE = Path("reports/prepare.json")
QUANTIZE = Path("reports/quantize.json")
QUANTIZE_PICTURE = Path("reports/quantize.svg")
TRAIN = Path("reports/train.json")
CURVE = Path("reports/train/loss.csv")
MERGE = Path("reports/merge.json")
EVALUATE = Path("reports/evaluate")
ANSWERS = Path("reports/answers")
PLAN = Path("reports/plan.json")
PLAN_PICTURE = Path("reports/plan.svg")
VARIANTS = ("base", "quantized", "adapter", "merged")

T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """The contents of the files; a key that one of them lacks is shown as missing, later."""

    parameters: dict[str, Any]
    pipeline: dict[str, Any]
    prepare: dict[str, Any]
    quantize: dict[str, Any]
    quantize_picture: str
    train: dict[str, Any]
    curve: list[dict[str, float | None]]
    merge: dict[str, Any]
    evaluate: dict[str, dict[str, Any]]  # by variant
    answers: dict[str, list[dict[str, Any]]]  # by variant
    plan: dict[str, Any]
    plan_picture: str


def read(root: Path) -> Sources:
    """Read all of it.

    Raises:
        UserError: a file is missing, or is not what its stage writes.
    """
    answers = {v: _read(root / ANSWERS / f"{v}.json", _json) for v in VARIANTS}
    return Sources(
        parameters=_read(root / PARAMETERS, _yaml),
        pipeline=_read(root / PIPELINE, _yaml),
        prepare=_read(root / PREPARE, _json),
        quantize=_read(root / QUANTIZE, _json),
        quantize_picture=_read(root / QUANTIZE_PICTURE, str),
        train=_read(root / TRAIN, _json),
        curve=_read(root / CURVE, _curve),
        merge=_read(root / MERGE, _json),
        evaluate={v: _read(root / EVALUATE / f"{v}.json", _json) for v in VARIANTS},
        answers={variant: content.get("answers") or [] for variant, content in answers.items()},
        plan=_read(root / PLAN, _json),
        plan_picture=_read(root / PLAN_PICTURE, str),
    )


def _read(path: Path, parse: Callable[[str], T]) -> T:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found; the report needs it; run `dvc repro`, which makes it first"
        ) from None
    except (ValueError, YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: cannot be read ({reason}); expected what the pipeline wrote there; "
            "delete it and run `dvc repro`"
        ) from None


def _json(text: str) -> dict[str, Any]:
    return _mapping(json.loads(text))


def _yaml(text: str) -> dict[str, Any]:
    """By YAML 1.2, as DVC reads it for the stages: 010 is 10 and no octal 8, 1e-3 is a number."""
    return _mapping(YAML(typ="safe").load(text))


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where an object was expected")
    return value


def _curve(text: str) -> list[dict[str, float | None]]:
    rows = csv.DictReader(text.splitlines())
    found = list(rows)
    if any(None in row for row in found):
        raise ValueError("a line with more cells than there are columns")
    return [{key: float(cell) if cell else None for key, cell in row.items()} for row in found]
