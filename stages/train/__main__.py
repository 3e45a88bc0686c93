"""Train the adapter, or in full fine-tuning all weights, and keep the best evaluation.

Reads:  data/prepared/train.parquet, data/prepared/eval.parquet, models/quantized
Writes: models/adapter, reports/train.json, reports/train/loss.csv
Run:    python -m stages.train
"""

from pathlib import Path

from stages.shared import files, params
from stages.shared.errors import run
from stages.train.settings import Params

PREPARED = Path("data/prepared")
QUANTIZED = Path("models/quantized")
ADAPTER = Path("models/adapter")
METRICS = Path("reports/train.json")
CURVE = Path("reports/train/loss.csv")


def main() -> None:
    """Read, train, write."""
    settings = params.load(Params, "train")
    # Imported late: a mistake in params.yaml is told before the seconds that torch takes.
    from stages.train.training import train  # noqa: PLC0415

    with files.whole_folder(ADAPTER) as partial:
        metrics, curve = train(settings, PREPARED, QUANTIZED, partial)
    curve.write(CURVE)
    files.write_json(METRICS, metrics)


if __name__ == "__main__":
    run(main)
