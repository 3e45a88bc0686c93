"""Evaluate one of the four models: loss and replies on held-out conversations.

Reads:  data/prepared/eval.parquet, data/prepared/format.json, models/tokenizer, and of
        models/{base,quantized,adapter,merged} the variant's own
Writes: reports/evaluate/<variant>.json, reports/details/evaluate/<variant>.json,
        reports/answers/<variant>.json
Run:    python -m stages.evaluate base | quantized | adapter | merged
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from stages.evaluate.config import Params
from stages.shared.core import files, params, progress
from stages.shared.core.errors import run

PREPARED = Path("data/prepared")
TOKENIZER = Path("models/tokenizer")
QUANTIZED = Path("models/quantized")  # base of the adapter
MODELS = {
    "base": Path("models/base"),
    "quantized": QUANTIZED,
    "adapter": Path("models/adapter"),
    "merged": Path("models/merged"),
}
METRICS = Path("reports/evaluate")
DETAILS = Path("reports/details/evaluate")
KEYS = ("loss", "perplexity", "bits_per_byte", "tokens", "stop_rate", "exact_match")
COMPARED = {*KEYS, *(f"by_language.{name}.{key}" for name in ("en", "other") for key in KEYS)}
ANSWERS = Path("reports/answers")


def add_options(parser: ArgumentParser) -> None:
    """Add the variant, as in dvc.yaml's `evaluate@<variant>`."""
    parser.add_argument("variant", choices=MODELS)


def main(options: Namespace) -> None:
    """Run the stage."""
    variant = options.variant
    settings = params.load(Params, f"evaluate@{variant}")
    # Imported late: errors in params.yaml are reported before the seconds that torch takes.
    with progress.quick_imports():
        from stages.evaluate.evaluate import evaluate  # noqa: PLC0415

    metrics, answers = evaluate(
        variant, MODELS[variant], QUANTIZED, TOKENIZER, PREPARED, settings.evaluate
    )
    files.write_json(ANSWERS / f"{variant}.json", answers)
    name = f"{variant}.json"
    files.write_report(METRICS / name, DETAILS / name, metrics, COMPARED)


if __name__ == "__main__":
    run(main, add_options)
