"""Train the adapter, or in full fine-tuning all weights, and keep the best evaluation.

Reads:  data/prepared/train.parquet, data/prepared/eval.parquet, models/quantized,
        models/base (for lora.init loftq)
Writes: models/adapter, reports/train.json, reports/train/loss.csv, reports/environment.json
Run:    python -m stages.train
        Stopped or killed, it goes on from its last checkpoint when it is run again.
"""

from pathlib import Path

from stages.shared.core import files, params, progress
from stages.shared.core.errors import run
from stages.train.settings import Params

INPUTS = {
    "train": Path("data/prepared/train.parquet"),
    "eval": Path("data/prepared/eval.parquet"),
    "model": Path("models/quantized"),
    "original": Path("models/base"),
}
ADAPTER = Path("models/adapter")
METRICS = Path("reports/train.json")
CURVE = Path("reports/train/loss.csv")
ENVIRONMENT = Path("reports/environment.json")


def main() -> None:
    """Read, train, write."""
    settings = params.load(Params, "train")
    # Imported late: a mistake in params.yaml is told before the seconds that torch takes.
    with progress.quick_imports():
        from stages.train.training import resumable, train  # noqa: PLC0415

    with resumable(settings, INPUTS) as checkpoints:
        outcome = train(settings, INPUTS, checkpoints)
        with files.whole_folder(ADAPTER) as partial:
            files.link_folder(checkpoints.best, partial)
        outcome.curve.write(CURVE)
        files.write_json(METRICS, outcome.metrics)
        files.write_json(ENVIRONMENT, outcome.environment)
        checkpoints.clear()


if __name__ == "__main__":
    run(main)
