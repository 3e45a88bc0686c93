"""What a person looks at: one page that opens offline, and the model's card.

Reads:  params.yaml, dvc.yaml (by way of stages/report/pipeline.yaml), reports/prepare.json,
        reports/quantize.json, reports/quantize.svg, reports/train.json, reports/train/loss.csv,
        reports/merge.json, reports/plan.json, reports/plan.svg, and of each variant
        reports/evaluate/<variant>.json and reports/answers/<variant>.json
Writes: reports/report.html, reports/model_card.md
Run:    python -m stages.report
"""

from pathlib import Path

from stages.report import page, sources, wording
from stages.report.sources import Sources
from stages.shared.core import files, params
from stages.shared.core.errors import run
from stages.shared.core.params import Section

PAGE = Path("reports/report.html")
MODEL_CARD = Path("reports/model_card.md")


class Report(Section):
    """Nothing to choose yet."""


class Params(Section):
    """The sections that `report` declares."""

    report: Report


def summary(source: Sources) -> str:
    """What the pipeline ends with on a terminal: where to look, and what was gained."""
    base, tuned = source.evaluate["base"], source.evaluate["merged"]
    gain = page.gain(source)
    loss, match, stop = (
        f"{show(base.get(key))} → {show(tuned.get(key))}"
        for key, show in (
            ("loss", wording.number),
            ("exact_match", wording.percent),
            ("stop_rate", wording.percent),
        )
    )
    agreement = wording.percent(source.merge.get("top1_agreement"), 2)
    divergence = wording.scientific(source.merge.get("kl_divergence"))
    return "\n".join(
        [
            f"report       {PAGE} (opens in any browser, offline), {MODEL_CARD}",
            f"loss         {loss} nats a token, base → tuned ({wording.signed(gain['loss'])})",
            f"exact match  {match} ({wording.points(gain['exact_match'])} points)",
            f"stop rate    {stop} ({wording.points(gain['stop_rate'])} points)",
            f"merge        agrees with what was trained in {agreement} of the most likely tokens, "
            f"{divergence} nats a token",
        ]
    )


def main() -> None:
    """Read, render, write, print."""
    params.load(Params, "report")
    source = sources.read(Path())
    html, card = page.html(source), page.model_card(source)
    files.write_text(MODEL_CARD, card)
    files.write_text(PAGE, html)
    print(summary(source))


if __name__ == "__main__":
    run(main)
