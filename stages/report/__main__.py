"""Report: one HTML page that opens offline, and the model card.

Reads:  params.yaml, matplotlibrc, reports/{prepare,quantize,train,merge,export,plan}.json,
        reports/evaluate/<variant>.json, their reports/details/<stage>.json,
        reports/answers/<variant>.json, reports/train/loss.csv, reports/{quantize,plan}.svg;
        the commit, dvc.lock
Writes: reports/report.html, reports/model_card.md
Run:    python -m stages.report
"""

from pathlib import Path

from stages.shared.core import files, params
from stages.shared.core.command import quick_imports, run
from stages.shared.core.params import Section

PAGE = Path("reports/report.html")
MODEL_CARD = Path("reports/model_card.md")


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    report: Section  # no parameters yet


def main() -> None:
    """Read, render, write, print."""
    params.load(Params, "report")
    # Imported late: a mistake in params.yaml is reported before the second that charts take.
    with quick_imports():
        from stages.report import page, sources  # noqa: PLC0415

    source = sources.read(Path())
    html, card = page.html(source), page.model_card(source)
    files.write_text(MODEL_CARD, card)
    files.write_text(PAGE, html)
    print(page.summary(source), end="")


if __name__ == "__main__":
    run(main)
