"""Inputs of an evaluation: settings, the four models, and adapters of other experiments."""

from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from ruamel.yaml import YAML

from stages.shared.core.errors import UserError
from stages.shared.core.params import Section

if TYPE_CHECKING:
    from stages.shared.chat.templates import Format

MODELS = {
    "base": Path("models/base"),
    "quantized": Path("models/quantized"),
    "adapter": Path("models/adapter"),
    "merged": Path("models/merged"),
}
ADAPTER, QUANTIZED = MODELS["adapter"], MODELS["quantized"]
TOKENIZER = Path("models/tokenizer")
PREPARED = Path("data/prepared")
FORMAT, HELD_OUT = PREPARED / "format.json", PREPARED / "eval.parquet"
LOCK = Path("dvc.lock")
WORKSPACE = "workspace"  # DVC's name of the working tree


class Evaluate(Section):
    """Generation of replies."""

    generate_rows: Annotated[int, Field(ge=0, le=100_000)]
    max_new_tokens: Annotated[int, Field(ge=1, le=131_072)]
    prompts: Annotated[int, Field(ge=0, le=1000)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    evaluate: Evaluate


def fetch_adapter(
    experiment: str, folder: Path, *, whole: bool = False, scored: bool = False
) -> tuple[Path, "Format"]:
    """Bring an experiment's adapter from DVC's cache into `folder`; returns path and chat format.

    Raises:
        UserError: there is no such experiment, its adapter is not in the cache or was trained on
            another base than the one here, or it is a whole model, left by full fine-tuning, and
            `whole` is false. If it will be `scored`, also where its chat template is another than
            the held-out conversations' here, or it may have been trained on some of them.
    """
    from dvc.api import DVCFileSystem  # noqa: PLC0415  (a second)
    from dvc.exceptions import DvcException  # noqa: PLC0415

    from stages.shared.chat.templates import Format, read_format  # noqa: PLC0415

    bring = f"`dvc exp apply {experiment}` brings its"
    if experiment == WORKSPACE:
        target, form = ADAPTER, read_format(FORMAT)
    else:
        try:
            commit = DVCFileSystem(rev=experiment)
            lock = commit.read_text(LOCK.as_posix(), encoding="utf-8")
        except (DvcException, FileNotFoundError):
            raise UserError(
                f"{experiment}: no experiment, branch or commit with a run of the pipeline. "
                "`dvc exp show` lists them."
            ) from None
        current = LOCK.read_text(encoding="utf-8")
        for path, fault in ((QUANTIZED, "was trained on another"), (HELD_OUT, "may know rows of")):
            if (scored or path == QUANTIZED) and _locked(lock, path) != _locked(current, path):
                raise UserError(f"{experiment}: its adapter {fault} {path}. {bring} own.")
        target = Path(mkdtemp(dir=folder)) / ADAPTER.name
        try:
            commit.get(ADAPTER.as_posix(), str(target), recursive=True)
            text = commit.read_text(FORMAT.as_posix(), encoding="utf-8")
        except (DvcException, FileNotFoundError):
            raise UserError(
                f"{experiment}: its adapter is not in the cache. `dvc exp pull` brings it."
            ) from None
        form = Format.model_validate_json(text)
    if not whole and not (target / "adapter_config.json").is_file():
        raise UserError(f"{experiment}: is fully fine-tuned and has no adapter. {bring} model.")
    if scored and form != read_format(FORMAT):
        raise UserError(
            f"{experiment}: its adapter was trained with another chat template than the held-out "
            f"conversations have here. {bring} own."
        )
    return target, form


def _locked(lock: str, path: Path) -> Any:
    """MD5 of an out in a dvc.lock."""
    stages = (YAML(typ="safe").load(lock) or {}).get("stages", {})
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    return next((out.get("md5") for out in outs if out["path"] == path.as_posix()), None)
