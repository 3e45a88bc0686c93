"""Input files of the report."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.shared.core.errors import UserError

VARIANTS = ("base", "quantized", "adapter", "merged")
STAGES = ("prepare", "quantize", "train", "merge", "export")  # with metrics and details
REPORTS, DETAILS = Path("reports"), Path("reports/details")
FILES = {
    "parameters": Path("params.yaml"),
    "quantize_chart": Path("reports/quantize.svg"),
    "history": Path("reports/train/loss.csv"),
    "plan": Path("reports/plan.json"),
    "plan_chart": Path("reports/plan.svg"),
}
ANSWERS = Path("reports/answers")


@dataclass(frozen=True)
class Sources:
    """Contents of the files, metrics with their details; a missing key is a dash later."""

    parameters: dict[str, Any]
    prepare: dict[str, Any]
    quantize: dict[str, Any]
    quantize_chart: str
    train: dict[str, Any]
    environment: dict[str, Any]  # of the training
    expert_use: dict[str, Any]  # of a mixture, before and after training; else empty
    history: pd.DataFrame  # loss.csv; NaN where nothing was measured
    merge: dict[str, Any]
    export: dict[str, Any]
    plan: dict[str, Any]
    plan_chart: str
    evaluate: dict[str, dict[str, Any]]  # by variant
    answers: dict[str, list[dict[str, Any]]]  # by variant


def read(root: Path) -> Sources:
    """Read every input below `root`."""
    answers = {variant: _read(root / ANSWERS / f"{variant}.json") for variant in VARIANTS}
    reports: dict[str, Any] = {stage: _read_report(root, f"{stage}.json") for stage in STAGES}
    return Sources(
        **{name: _read(root / path) for name, path in FILES.items()},
        **reports,
        environment=reports["train"].pop("environment", {}),
        expert_use=reports["train"].pop("expert_use", {}),
        evaluate={variant: _read_report(root, f"evaluate/{variant}.json") for variant in VARIANTS},
        answers={variant: content.get("answers") or [] for variant, content in answers.items()},
    )


def _read_report(root: Path, name: str) -> dict[str, Any]:
    """Metrics of a stage joined with its details."""
    return _join(_read(root / REPORTS / name), _read(root / DETAILS / name))


def _join(metrics: Any, details: Any) -> Any:
    if not (isinstance(metrics, dict) and isinstance(details, dict)):
        return metrics
    joined = {key: _join(value, details.get(key)) for key, value in metrics.items()}
    return joined | {key: value for key, value in details.items() if key not in joined}


def _read(path: Path) -> Any:
    try:
        return PARSERS[path.suffix](path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found. Run `dvc repro`, which writes it first.") from None
    except (ValueError, YAMLError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        what = f"cannot be read ({reason}). Delete it and run `dvc repro`."
        raise UserError(f"{path}: {what}") from None


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where an object was expected")
    return value


PARSERS: dict[str, Callable[[str], Any]] = {
    ".json": lambda text: _mapping(json.loads(text)),
    # YAML 1.2, as DVC reads it: 010 is 10, not octal 8, and 1e-3 is a number.
    ".yaml": lambda text: _mapping(YAML(typ="safe").load(text)),
    ".csv": lambda text: pd.read_csv(io.StringIO(text), dtype=float),
    ".svg": str,
}
