"""Rendering of the page, its charts and the model card, with every untrusted text escaped."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stages.report import comparison, formats
from stages.report.sources import VARIANTS, Sources, origin_of, provenance
from stages.shared.core.display import visible
from stages.shared.core.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
# Section → key of reports/<section>.json → label, or [label, explanation].
LABELS = yaml.safe_load((TEMPLATES / "labels.yaml").read_text(encoding="utf-8"))
# The peak and its parts in plan.json, `<part>_bytes`; those that no technique has are left out.
PARTS = "peak weights adapter gradients optimizer activations logits workspace".split()  # noqa: SIM905
FILTERS = "number signed percent points size value words scientific yaml_value flat markdown"
ACTIVE = re.compile(r"<script|<foreignobject|<iframe|\son\w+\s*=|javascript:", re.IGNORECASE)


def environment() -> Environment:
    """Jinja environment that escapes everything and shows missing values as a dash."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {name: getattr(formats, name) for name in FILTERS.split()}
    env.globals |= {"verdict": comparison.verdict, "label": label}
    return env


def _finalize(item: Any) -> Any:
    if formats.is_missing(item):
        return formats.MISSING
    plain = isinstance(item, str) and not isinstance(item, Markup)
    return visible(item.replace("\r\n", "\n")) if plain else item


def label(section: str, key: str) -> tuple[str, str]:
    """Label and explanation of a key of reports/<section>.json; the key's words by default."""
    labels, (parent, _, leaf) = LABELS[section], key.rpartition(".")
    known = labels.get(key) or labels.get(f"{parent}.*")
    if known is None:
        return key.replace(".", ", ").replace("_", " ").capitalize(), ""
    text, explanation = known if isinstance(known, list) else (known, "")
    return text.replace("*", leaf), explanation


def context(sources: Sources) -> dict[str, Any]:
    """Variables of both templates."""
    table = comparison.metrics_table(sources.evaluate)
    memory = memory_table(sources.plan.get("techniques") or {})
    shown = (sources.parameters.get("evaluate") or {}).get("prompts", 8)
    prompts = comparison.join_answers(sources.answers)
    correct = [comparison.merged_is_correct(prompt) for prompt in prompts]
    exported = {f"exported {name}": of_format for name, of_format in sources.export.items()}
    return {
        "source": sources,
        "parameters": sources.parameters,
        "origin": origin_of(sources.parameters),
        "method": method(sources.parameters),
        "trained_on": trained_on(sources),
        "variants": VARIANTS,
        "metrics": comparison.METRICS,
        "counts": comparison.COUNTS,
        "table": table.to_dict("index"),
        "change": comparison.changes(table).to_dict("index"),
        "noise": comparison.noise(table).to_dict("index"),
        "exported": comparison.metrics_table(exported).to_dict("index"),
        "pairs": comparison.CHANGES,
        "gain": (table.loc["merged"] - table.loc["base"]).to_dict(),
        "languages": comparison.language_tables(sources.evaluate),
        "part_losses": comparison.part_losses(sources.evaluate).to_dict("index"),
        "memory": memory.to_dict("index"),
        "memory_unit": memory.attrs["unit"],
        "parts": [part for part in PARTS if part in memory],
        "prompts": comparison.select(prompts, shown),
        "wrong": correct.count(False),
        "answered": correct.count(False) + correct.count(True),
    }


def memory_table(techniques: dict[str, Any]) -> pd.DataFrame:
    """Peak, its parts and the smallest card, by technique; in GB from 10 GB on, else MB."""
    plan = pd.DataFrame.from_dict(techniques, orient="index")
    sizes = plan.reindex(columns=[f"{part}_bytes" for part in PARTS]).astype(float)
    sizes = sizes.dropna(axis=1, how="all").rename(columns=lambda name: name.removesuffix("_bytes"))
    unit = "GB" if sizes.max().max() >= 1e10 else "MB"
    table = sizes / formats.UNITS[unit]
    for name, technique in techniques.items():
        fitting = (card for card, fits in (technique.get("fits") or {}).items() if fits is True)
        table.loc[name, "card"] = formats.words(next(fitting, "none"))
    table.attrs["unit"] = unit
    return table


def method(parameters: dict[str, Any]) -> str:
    """QLoRA, LoRA or full fine-tuning."""
    if (parameters.get("train") or {}).get("method") == "full":
        return "full fine-tuning"
    precision = (parameters.get("quantize") or {}).get("precision")
    return "QLoRA" if precision in ("nf4", "fp4") else "LoRA"


def trained_on(sources: Sources) -> str | None:
    """Conversations trained on up to the best step; `n of total` before the end of an epoch.

    Those that have several rows may be there in part: then rows are counted.
    """
    train = sources.prepare.get("train") or {}
    total, rows = train.get("conversations"), train.get("rows") or train.get("conversations")
    steps = sources.train.get("best_step")
    batch = (sources.parameters.get("train") or {}).get("batch_size")
    if total is None or steps is None or batch is None or steps * batch >= rows:
        return None if total is None else formats.value(total)
    begun = f"{formats.value(steps * batch)} of {formats.value(rows)}"
    return begun if rows == total else f"{begun} rows of {formats.value(total)}"


def html(sources: Sources) -> str:
    """Self-contained HTML page."""
    history = training_history(sources.history, sources.train.get("best_step"))
    svgs = {
        "train": (history, "Loss, learning rate and gradient norm by step"),
        "quantize": (sources.quantize_chart, "4-bit codebooks against a layer's weights"),
        "plan": (sources.plan_chart, "Peak memory of each technique, by part"),
    }
    if use := sources.expert_use:
        svgs["experts"] = expert_use(use), "Tokens by layer and expert"
    inlined = {name: inline(svg, name, text) for name, (svg, text) in svgs.items()}
    rows = provenance(sources.environment)
    return _render("page.html.j2", sources, charts=inlined, provenance=rows)


def model_card(sources: Sources, artifact: str = "merged", **upload: str) -> str:
    """Model card of an artifact in Markdown.

    `upload` has more for the hub: `metadata` in YAML, the `repo` and the licence's `notice`.
    """
    return _render("model_card.md.j2", sources, artifact=artifact, **upload)


def summary(sources: Sources) -> str:
    """Summary for the terminal: the files and the gain."""
    return _render("summary.txt.j2", sources)


def _render(template: str, sources: Sources, **variables: Any) -> str:
    return environment().get_template(template).render(context(sources), **variables)


def training_history(history: pd.DataFrame, best_step: int | None) -> str:
    """SVG of loss, learning rate and gradient norm by optimizer step, with the best step marked."""
    figure = Figure(figsize=(8.0, 6.2))
    losses, rates, norms = figure.subplots(3, 1, sharex=True, height_ratios=[2.6, 1, 1])
    held_out = _points(history, "eval_loss")
    losses.plot(_points(history, "loss"), linewidth=1.2, label="training, each step")
    line = ":" if len(held_out) > 2 else "none"  # two points are no course
    losses.plot(held_out, linestyle=line, marker="o", markersize=5, label="held-out")
    losses.set(ylabel="loss, nats a token")
    rates.plot(_points(history, "learning_rate"), linewidth=1.2, color="C2")
    rates.set(ylabel="learning rate")
    norms.plot(_points(history, "gradient_norm"), linewidth=1.0, color="C3")
    norms.set(ylabel="gradient norm", xlabel="optimizer step")
    figure.align_ylabels()
    for panel in (losses, rates, norms) if best_step is not None else ():
        kept = f"kept: step {best_step}"
        panel.axvline(best_step, color="C5", linewidth=1, linestyle="--", label=kept)
    losses.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    return _svg(figure)


def expert_use(use: Mapping[str, Any]) -> str:
    """SVG of each expert's tokens, in even shares, by layer: before and after training."""
    shares = {when: np.array(values["shares"]) for when, values in use.items()}
    layers, experts = next(iter(shares.values())).shape
    largest = experts * max(share.max() for share in shares.values())
    figure = Figure(figsize=(9.0, 1.8 + min(5.0, 0.25 * layers)))
    panels = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for panel, (when, share) in zip(panels, shares.items(), strict=True):
        style = {"extent": (0.5, experts + 0.5, layers + 0.5, 0.5), "vmin": 0, "vmax": largest}
        image = panel.imshow(share * experts, "Blues", aspect="auto", **style)
        panel.set_title(f"{when} training", loc="left")
        panel.set(xlabel="expert")
        panel.grid(visible=False)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set(ylabel="layer with experts")
    figure.colorbar(image, ax=list(panels), label="tokens, even share = 1")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def _points(history: pd.DataFrame, column: str) -> pd.Series:
    """A column by step, without unmeasured steps."""
    if not {"step", column} <= set(history.columns):
        return pd.Series(dtype=float)
    return history.set_index("step")[column].dropna()


def inline(svg: str, name: str, label: str) -> Markup:
    """SVG of the stage `name` as an element of the page, sized by CSS; active content is refused.

    Its ids get the prefix `name`: matplotlib gives two charts the same ids.
    """
    start, end = svg.find("<svg"), svg.rfind("</svg>")
    if start < 0 or end < 0 or ACTIVE.search(svg):
        raise UserError(f"reports/{name}.svg: not a plain chart. Run `dvc repro -f {name}`.")
    body = re.sub(r"<metadata>.*?</metadata>", "", visible(svg[start:end]) + "</svg>", flags=re.S)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", body)
    head, _, rest = body.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    opening = Markup('{} role="img" aria-label="{}">').format(Markup(head), label)  # noqa: S704
    return opening + Markup(rest)  # noqa: S704  (checked above)
