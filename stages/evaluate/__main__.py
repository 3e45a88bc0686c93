"""Evaluate one of the four models: loss and replies on held-out conversations.

Or several experiments' adapters on one loaded base: that prints a table and writes nothing.

Reads:  data/prepared/eval.parquet, data/prepared/format.json, models/tokenizer, and of
        models/{base,quantized,adapter,merged} the variant's own
Writes: reports/evaluate/<variant>.json, reports/details/evaluate/<variant>.json,
        reports/answers/<variant>.json
Run:    python -m stages.evaluate base | quantized | adapter | merged
        One that fits no device is divided among all, as QLORA_SHARD says (docs/clusters.md).
        python -m stages.evaluate --adapters EXPERIMENT ...     (workspace: the one that lies here)
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from stages.evaluate.inputs import MODELS, PREPARED, QUANTIZED, TOKENIZER, Params, fetch_adapter
from stages.shared.core import files, params
from stages.shared.core.command import quick_imports, run
from stages.shared.core.machine import device

METRICS, DETAILS = Path("reports/evaluate"), Path("reports/details/evaluate")
ANSWERS = Path("reports/answers")
KEYS = ("loss", "perplexity", "bits_per_byte", "tokens", "stop_rate", "exact_match")
COMPARED = {*KEYS, *(f"by_language.{name}.{key}" for name in ("en", "other") for key in KEYS)}
COMPARED |= {f"tool_calls.{name}" for name in ("rows", "name_match", "exact_match")}


def add_options(parser: ArgumentParser) -> None:
    """Add the variant, as in dvc.yaml's `evaluate@<variant>`, or experiments by DVC's names."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("variant", choices=MODELS, nargs="?")
    group.add_argument("--adapters", nargs="+", metavar="EXPERIMENT")


def main(options: Namespace) -> None:
    """Run the stage, or print the table."""
    if options.adapters:
        print_adapters(options.adapters)
        return
    variant = options.variant
    settings = params.load(Params, f"evaluate@{variant}").evaluate
    # Imported late: errors in params.yaml are reported before the seconds that torch takes.
    with quick_imports():
        from stages.evaluate.evaluate import evaluate_on  # noqa: PLC0415
        from stages.shared.parallel.group import joined  # noqa: PLC0415
        from stages.shared.parallel.launcher import compute  # noqa: PLC0415
        from stages.shared.parallel.placement import shards_for  # noqa: PLC0415

    model, target = MODELS[variant], device()
    inputs = (variant, model, QUANTIZED, TOKENIZER, PREPARED, settings)
    with joined(target) as member:
        shards = shards_for(QUANTIZED if variant == "adapter" else model, target, member)
        metrics, answers = compute(member, target, shards, evaluate_on, *inputs)
        if member and not member[0].is_main:
            return
    name = f"{variant}.json"
    files.write_json(ANSWERS / name, answers)
    files.write_report(METRICS / name, DETAILS / name, metrics, COMPARED)


def print_adapters(experiments: list[str]) -> None:
    """Evaluate the adapters of experiments together, and print their metrics."""
    settings = params.load(Params, "evaluate@adapter").evaluate
    with quick_imports():
        from stages.evaluate.evaluate import evaluate_adapters  # noqa: PLC0415

    with TemporaryDirectory() as folder:
        adapters = {
            name: fetch_adapter(name, Path(folder), scored=True)[0]
            for name in dict.fromkeys(experiments)
        }
        print(f"{'adapter':20}" + "".join(f"{key:>15}" for key in KEYS), flush=True)
        for name, metrics in evaluate_adapters(adapters, QUANTIZED, TOKENIZER, PREPARED, settings):
            shown = ("–" if metrics[key] is None else f"{metrics[key]:.5g}" for key in KEYS)
            print(f"{name:20}" + "".join(f"{text:>15}" for text in shown), flush=True)


if __name__ == "__main__":
    run(main, add_options)
