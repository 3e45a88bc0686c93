"""Training as the stage does it, on the tiny model."""

from pathlib import Path
from typing import Any

import yaml

from stages.shared.core import files
from stages.train.checkpoints import claim
from stages.train.config import Params
from stages.train.devices import TrainResult, train
from tests import tiny

DEFAULTS = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())


def settings(**changes: Any) -> Params:
    """The defaults, made small: `settings(lora__r=8, train__epochs=1)`."""
    values = {s: dict(DEFAULTS[s]) for s in ("lora", "train")}
    values["lora"].update(r=4)
    values["train"].update(batch_size=4, epochs=2, learning_rate=5e-3)
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        values[section][key] = value
    return Params.model_validate(values)


def train_on(
    wanted: Params, data: Path, model: Path, keep: Path, original: Path | None = None
) -> TrainResult:
    """Train, and leave the result in `keep`; resume state lies beside it, and goes."""
    inputs = {"train": data / "train.parquet", "eval": data / "eval.parquet", "model": model}
    inputs |= {"original": original} if original else {}
    with claim(keep.parent, "a-training", keep=2) as checkpoints:
        outcome = train(wanted, inputs, checkpoints)
        files.link_folder(checkpoints.best, keep)
        checkpoints.clear()
    return outcome


def run(folder: Path, data: Path, precision: str, **changes: Any) -> tuple[dict, Any, Path]:
    """Quantize the tiny model in `folder` and train on it; returns metrics, curve and adapter."""
    base = tiny.quantize(folder / "quantized", precision)
    keep = folder / "adapter"
    outcome = train_on(settings(**changes), data, base, keep)
    return outcome.metrics, outcome.history, keep
