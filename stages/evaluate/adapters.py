"""Adapters of other experiments, brought from DVC's cache by the experiment's name."""

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ruamel.yaml import YAML

from stages.shared.chat.templates import Format, read_format
from stages.shared.core.errors import UserError

WORKSPACE = "workspace"  # DVC's name of what lies here
ADAPTER, QUANTIZED = Path("models/adapter"), Path("models/quantized")
FORMAT = Path("data/prepared/format.json")
LOCK = Path("dvc.lock")


def fetch(experiment: str, folder: Path) -> tuple[Path, Format]:
    """Bring an experiment's adapter into `folder`; returns its path and its chat format.

    Raises:
        UserError: there is no such experiment, its adapter was trained on another base than the
            one that lies here, or it is not in the cache.
    """
    from dvc.api import DVCFileSystem  # noqa: PLC0415  (a second)
    from dvc.exceptions import DvcException  # noqa: PLC0415

    if experiment == WORKSPACE:
        return ADAPTER, read_format(FORMAT)
    try:
        there = DVCFileSystem(rev=experiment)
        lock = there.read_text(LOCK.as_posix(), encoding="utf-8")
    except (DvcException, FileNotFoundError):
        raise UserError(
            f"{experiment}: no experiment, branch or commit with a run of the pipeline. "
            "`dvc exp show` lists them."
        ) from None
    if _locked(lock, QUANTIZED) != _locked(LOCK.read_text(encoding="utf-8"), QUANTIZED):
        raise UserError(
            f"{experiment}: its adapter was trained on another {QUANTIZED}. "
            f"`dvc exp apply {experiment}` brings both."
        )
    target = Path(mkdtemp(dir=folder)) / ADAPTER.name
    try:
        there.get(ADAPTER.as_posix(), str(target), recursive=True)
        text = there.read_text(FORMAT.as_posix(), encoding="utf-8")
    except (DvcException, FileNotFoundError):
        raise UserError(
            f"{experiment}: its adapter is not in the cache. `dvc exp pull` brings it."
        ) from None
    return target, Format.model_validate_json(text)


def require_adapter(experiment: str, folder: Path) -> None:
    """Raise a UserError for a whole model, which full fine-tuning leaves in an adapter's place."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{experiment}: is fully fine-tuned and has no adapter. `dvc exp apply {experiment}` "
            "brings its model."
        )


def _locked(lock: str, path: Path) -> Any:
    """MD5 of an out in a dvc.lock."""
    stages = (YAML(typ="safe").load(lock) or {}).get("stages", {})
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    return next((out.get("md5") for out in outs if out["path"] == path.as_posix()), None)
