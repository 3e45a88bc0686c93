"""Adapters of other experiments, brought from DVC's cache by the experiment's name."""

from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from stages.shared.core.errors import UserError

if TYPE_CHECKING:
    from stages.shared.chat.templates import Format

WORKSPACE = "workspace"  # DVC's name of the working tree
ADAPTER, QUANTIZED = Path("models/adapter"), Path("models/quantized")
FORMAT, HELD_OUT = Path("data/prepared/format.json"), Path("data/prepared/eval.parquet")
LOCK = Path("dvc.lock")


def fetch(
    experiment: str, folder: Path, *, whole: bool = False, scored: bool = False
) -> tuple[Path, "Format"]:
    """Bring an experiment's adapter into `folder`; returns its path and its chat format.

    Raises:
        UserError: there is no such experiment, its adapter was trained on another base than the
            one that lies here or is not in the cache, or it is a whole model, left by full
            fine-tuning, and `whole` is false. Or it will be `scored`, and held out other rows than
            those that lie here, which may be among those that it was trained on.
    """
    from dvc.api import DVCFileSystem  # noqa: PLC0415  (a second)
    from dvc.exceptions import DvcException  # noqa: PLC0415

    from stages.shared.chat.templates import Format, read_format  # noqa: PLC0415

    if experiment == WORKSPACE:
        target, form = ADAPTER, read_format(FORMAT)
    else:
        try:
            there = DVCFileSystem(rev=experiment)
            lock = there.read_text(LOCK.as_posix(), encoding="utf-8")
        except (DvcException, FileNotFoundError):
            raise UserError(
                f"{experiment}: no experiment, branch or commit with a run of the pipeline. "
                "`dvc exp show` lists them."
            ) from None
        here = LOCK.read_text(encoding="utf-8")
        for path, fault in ((QUANTIZED, "was trained on another"), (HELD_OUT, "may know rows of")):
            if (scored or path == QUANTIZED) and _locked(lock, path) != _locked(here, path):
                raise UserError(
                    f"{experiment}: its adapter {fault} {path}. `dvc exp apply {experiment}` "
                    "brings its own."
                )
        target = Path(mkdtemp(dir=folder)) / ADAPTER.name
        try:
            there.get(ADAPTER.as_posix(), str(target), recursive=True)
            text = there.read_text(FORMAT.as_posix(), encoding="utf-8")
        except (DvcException, FileNotFoundError):
            raise UserError(
                f"{experiment}: its adapter is not in the cache. `dvc exp pull` brings it."
            ) from None
        form = Format.model_validate_json(text)
    if not whole and not (target / "adapter_config.json").is_file():
        raise UserError(
            f"{experiment}: is fully fine-tuned and has no adapter. `dvc exp apply {experiment}` "
            "brings its model."
        )
    return target, form


def _locked(lock: str, path: Path) -> Any:
    """MD5 of an out in a dvc.lock."""
    stages = (YAML(typ="safe").load(lock) or {}).get("stages", {})
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    return next((out.get("md5") for out in outs if out["path"] == path.as_posix()), None)
