"""From sources to the two texts: every text from data, model or parameters is escaped."""

from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from stages.report import charts, comparison, graph, pipeline, wording
from stages.report.origin import Origin, origin_of
from stages.report.sources import VARIANTS, Sources

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> Environment:
    """Templates that escape everything, and show what is missing as a dash."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=lambda item: wording.MISSING if wording.is_missing(item) else item,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {
        "number": wording.number,
        "signed": wording.signed,
        "percent": wording.percent,
        "points": wording.points,
        "size": wording.size,
        "in_unit": wording.in_unit,
        "value": wording.value,
        "scientific": wording.scientific,
        "yaml_value": wording.yaml_value,
        "flat": wording.flat,
        "label": wording.label,
        "md": lambda text: Markup(wording.markdown(text)),  # noqa: S704  (escapes by itself)
    }
    env.globals |= {"verdict": comparison.verdict}
    return env


def context(sources: Sources) -> dict[str, Any]:
    """What the templates are given."""
    origin = origin_of(sources.parameters)
    return {
        "source": sources,
        "parameters": sources.parameters,
        "evaluate": sources.evaluate,
        "variants": VARIANTS,
        "origin": origin,
        "method": method(sources.parameters),
        "learnt": learnt(sources),
        "differences": comparison.differences(sources.evaluate),
        "gain": gain(sources),
        "languages": comparison.by_language(sources.evaluate),
        "memory_unit": wording.common_unit(
            way.get("peak_bytes", 0) for way in (sources.plan.get("techniques") or {}).values()
        ),
        "prompts": comparison.prompts(sources.answers),
    }


def method(parameters: dict[str, Any]) -> str:
    """What the tuning is called: QLoRA, LoRA or full fine-tuning."""
    if (parameters.get("train") or {}).get("method") == "full":
        return "full fine-tuning"
    precision = (parameters.get("quantize") or {}).get("precision")
    return "QLoRA" if precision in ("nf4", "fp4") else "LoRA"


def learnt(sources: Sources) -> str | None:
    """How many conversations what was kept has learnt from, of those that there were."""
    there = (sources.prepare.get("train") or {}).get("conversations")
    steps = sources.train.get("best_step")
    batch = (sources.parameters.get("train") or {}).get("batch_size")
    if there is None or steps is None or batch is None or steps * batch >= there:
        return None if there is None else wording.value(there)
    return f"{wording.value(steps * batch)} of {wording.value(there)}"


def gain(sources: Sources) -> dict[str, float | None]:
    """From the base model to the merged one, a difference a metric."""
    base, merged = sources.evaluate["base"], sources.evaluate["merged"]
    return {m: comparison.difference(merged.get(m), base.get(m)) for m in comparison.METRICS}


def html(sources: Sources) -> str:
    """The page."""
    pictures = {
        "curve": charts.inline(
            charts.loss_curve(sources.curve, sources.train.get("best_step")),
            "train",
            "Training and held-out loss against the optimizer step",
        ),
        "quantize": charts.inline(
            sources.quantize_picture, "quantize", "Levels of 4-bit types against a layer's weights"
        ),
        "plan": charts.inline(
            sources.plan_picture, "plan", "Peak memory of each way to tune, by part"
        ),
    }
    drawing = graph.draw(pipeline.stages(sources.pipeline))
    template = environment().get_template("page.html.j2")
    return template.render(context(sources), pictures=pictures, graph=drawing, box=graph)


def model_card(sources: Sources) -> str:
    """The model card, in the form that the Hugging Face hub reads."""
    values = context(sources)
    origin: Origin = values["origin"]
    return (
        environment()
        .get_template("model_card.md.j2")
        .render(
            values,
            front_matter=Markup(origin.front_matter()),  # noqa: S704  (YAML, not HTML)
        )
    )
