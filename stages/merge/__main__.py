"""Merge the adapter into a standalone model, and verify that it matches the trained one.

Reads:  models/adapter, models/quantized, models/base, models/tokenizer,
        data/prepared/eval.parquet, data/prepared/format.json
Writes: models/merged, reports/merge.json, reports/details/merge.json
Run:    python -m stages.merge
"""

from pathlib import Path
from typing import Literal

from stages.shared.core import files, params
from stages.shared.core.command import quick_imports, run
from stages.shared.core.machine import device
from stages.shared.core.params import Section

ADAPTER = Path("models/adapter")
WEIGHTS = {"quantized": Path("models/quantized"), "original": Path("models/base")}
TOKENIZER = Path("models/tokenizer")
PREPARED = Path("data/prepared")
MERGED = Path("models/merged")
METRICS = Path("reports/merge.json")
DETAILS = Path("reports/details/merge.json")
COMPARED = {"onto", "kl_divergence", "top1_agreement", "bytes"}
COMPARED |= {"runtime_kl_divergence", "runtime_top1_agreement"}


class Merge(Section):
    """Base weights and dtype of the merged model."""

    onto: Literal["quantized", "original"]
    dtype: Literal["fp16", "bf16", "fp32"]


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    merge: Merge


def main() -> None:
    """Run the stage."""
    settings = params.load(Params, "merge").merge
    # Imported late: errors in params.yaml are reported before the seconds that torch takes.
    with quick_imports():
        from stages.merge.merge import follow, merge  # noqa: PLC0415
        from stages.shared.parallel.group import joined  # noqa: PLC0415

    with joined(device()) as member:
        if member and not member[0].is_main:
            follow(member, ADAPTER, WEIGHTS, PREPARED)
            return
        inputs = (ADAPTER, WEIGHTS, TOKENIZER, PREPARED)
        with files.whole_folder(MERGED) as partial:
            metrics = merge(settings.onto, settings.dtype, *inputs, partial, member)
    files.write_report(METRICS, DETAILS, metrics, COMPARED)


if __name__ == "__main__":
    run(main)
