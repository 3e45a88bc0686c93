"""The conversations that trainings are measured on, made by the stages' own functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from benchmarks.paced import ROOT
from stages.fetch_data import __main__ as fetch_data
from stages.prepare.preparing import prepare
from stages.prepare.settings import Prepare
from stages.shared.core.errors import UserError
from stages.shared.examples import read_examples
from stages.train.settings import Params

MAX_LENGTH = 512  # tokens
STEPS = 64  # that are drawn, and packed together; fewer are taken
SOURCES = {"sample": "data/sample/conversations.jsonl", "real": "../shared/data/conversations"}


def section(name: str) -> dict[str, Any]:
    """A section of params.yaml."""
    return yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))[name]


def sources() -> dict[str, Path]:
    """The sources that are on this machine, by name: the sample, and real conversations."""
    return {name: ROOT / path for name, path in SOURCES.items() if (ROOT / path).exists()}


def prepared(source: Path, tokenizer: Path, folder: Path) -> Path:
    """Fetch and prepare a source as the pipeline does.

    Args:
        source: what `data.path` would name.
        tokenizer: its folder.
        folder: an empty one to write into.

    Returns:
        The folder with train.parquet and eval.parquet.
    """
    raw, made = folder / "raw", folder / "prepared"
    raw.mkdir(parents=True)
    made.mkdir()
    asked = section("data") | {"source": "file", "path": str(source)}
    fetch_data.fetch(fetch_data.Data.model_validate(asked), raw)
    wanted = section("prepare") | {"max_length": MAX_LENGTH}
    prepare(raw, tokenizer, made, Prepare.model_validate(wanted))
    return made


def training_params(**changes: Any) -> Params:
    """`lora` and `train` of params.yaml at a constant learning rate; `lora__r=8` changes them."""
    sections = {name: section(name) for name in ("lora", "train")}
    sections["train"] |= {"scheduler": "constant", "warmup": 0.0, "max_steps": None}
    for name, value in changes.items():
        of, _, key = name.partition("__")
        sections[of][key] = value
    return Params.model_validate(sections)


@dataclass(frozen=True)
class Inputs:
    """What one set of conversations gives the workers.

    Attributes:
        name: of the conversations.
        tokens: that a step has on average; at least as many as the longest conversation.
        job: what each worker is told.
    """

    name: str
    tokens: int
    job: Mapping[str, Any]


def inputs_of(name: str, folder: Path, model: Path, tokenizer: Path) -> Inputs:
    """Describe prepared conversations to the workers."""
    lengths = list(map(len, read_examples(folder / "train.parquet")))
    batch_size = training_params().train.batch_size
    return Inputs(
        name,
        max(round(batch_size * mean(lengths)), *lengths),
        {
            "data": str(folder),
            "model": str(model),
            "tokenizer": str(tokenizer),
            "batch_size": batch_size,
            "steps": min(STEPS, len(lengths) // batch_size),
        },
    )


def require_model(*folders: Path) -> None:
    """Refuse to begin without the default's model.

    Raises:
        UserError: it is not there.
    """
    for folder in folders:
        if not (folder / "config.json").exists() and not (folder / "tokenizer.json").exists():
            raise UserError(
                f"{folder}: not there; expected the default's model; run `dvc repro quantize` first"
            )
