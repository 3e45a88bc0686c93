"""Inputs of the plan: parameters, a model's config.json, and counts of the training data."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from stages.shared.core import params
from stages.shared.core.errors import UserError
from stages.shared.core.params import BorrowedSection, Section
from stages.shared.step.config import Lora, Train

CONFIGS = Path(__file__).parent / "configs"
BASE = Path("models/base/config.json")
COUNTS = Path("reports/prepare.json")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([0-9a-f]{40}))?", re.ASCII)


class Quantize(BorrowedSection):
    """Precision of the linear layers."""

    precision: Literal["fp32", "bf16", "fp16", "int8", "fp4", "nf4"]
    double_quant: bool
    compute_dtype: Literal["bf16", "fp16", "fp32"]


class Plan(Section):
    """No keys yet."""


class Params(Section):
    """The sections that `plan` declares in dvc.yaml."""

    quantize: Quantize
    lora: Lora
    train: Train
    plan: Plan


Tried = Literal["quantize", "lora", "train"]  # by `--set`


def changed(values: Params, settings: Sequence[str]) -> Params:
    """The parameters with settings such as `lora.r=64`."""
    tried = values.model_dump()
    for setting in settings:
        key, separator, text = setting.partition("=")
        section, _, name = key.partition(".")
        if not separator or section not in get_args(Tried) or name not in tried[section]:
            known = ", ".join(f"{s}.{n}" for s in get_args(Tried) for n in tried[s])
            raise UserError(f"--set: {setting!r} is no parameter with a value. Set one of {known}.")
        try:
            tried[section][name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set: {setting!r} has no value of YAML. Correct it.") from None
    return params.validate(Params, tried)


def shipped() -> str:
    """Names of the shipped configs, for a message."""
    return ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))


def config_path(model: str | None) -> Path:
    """Find the config of a folder, file, shipped name or `owner/name[@commit]`; None: the base."""
    if model is None:
        return BASE
    path = Path(model)
    for file in (path / "config.json", path, CONFIGS / f"{model}.json"):
        if file.is_file():
            return file
    if match := HUB_NAME.fullmatch(model):
        return _of_hub(match[1], match[2])
    raise UserError(
        f"--model: {model!r} is no folder with a config.json and no such file. Name one, "
        f"owner/name of the hub, or one of {shipped()}."
    )


def _of_hub(name: str, commit: str | None) -> Path:
    """Download one file into the user's cache and print its commit."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  (half a second)

    from stages.shared.hub.repository import Repository, one_line_errors  # noqa: PLC0415

    revision = commit or "main"
    repository = Repository("model", name, revision)
    options: dict[str, Any] = {"revision": revision, "endpoint": repository.endpoint}
    with one_line_errors(repository):
        path = Path(hf_hub_download(name, "config.json", **options))
    print(f"{name} at {path.parent.name} ({'pinned' if commit else 'main'})")
    return path


@dataclass(frozen=True)
class Data:
    """Counts of the training conversations."""

    conversations: int
    tokens: int
    supervised_tokens: int
    longest: int  # tokens of the longest conversation

    @property
    def supervised_share(self) -> float:
        """Share of the tokens that are supervised."""
        return self.supervised_tokens / self.tokens

    @property
    def mean_length(self) -> float:
        """Mean tokens of a conversation."""
        return self.tokens / self.conversations


def data_of(max_length: int | None, batch_size: int, counts: Path = COUNTS) -> Data:
    """Counts of `prepare`, or of one step of `max_length` tokens a conversation, all supervised."""
    if max_length is not None:
        tokens = batch_size * max_length  # a conversation's first is never a target
        return Data(batch_size, tokens, tokens - batch_size, max_length)
    with suppress(OSError, ValueError, KeyError, TypeError):
        train = json.loads(counts.read_text(encoding="utf-8"))["train"]
        rows = train.get("rows", train["conversations"])  # of which a batch has train.batch_size
        names = ("tokens", "supervised_tokens", "longest_tokens")
        data = Data(rows, *(train[name] for name in names))
        if min(data.conversations, data.tokens, data.longest) > 0:
            return data
    raise UserError(f"{counts}: no counts of training conversations. Run `dvc repro prepare`.")
