"""Comparison of the four variants: metrics, changes between them, answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stages.report.formatting import number, percent, points, signed


@dataclass(frozen=True)
class Metric:
    """A column of the comparison."""

    label: str
    show: Callable[[Any], str]
    show_change: Callable[[Any], str]
    sign: int  # of an improvement
    count: str | None = None  # sample size of a fraction: the key of its number of replies


METRICS = {
    "loss": Metric("loss, nats", number, signed, -1),
    "perplexity": Metric("perplexity", lambda x: number(x, 3), signed, -1),
    "bits_per_byte": Metric("bits per byte", number, signed, -1),
    "exact_match": Metric("exact match", percent, points, +1, "answered_rows"),
    "stop_rate": Metric("stop rate", percent, points, +1, "generated_rows"),
}
COUNTS = {"tokens": "tokens scored", "conversations": "conversations"}
CHANGES = {
    "What quantization cost": ("quantized", "base"),
    "What training gained": ("adapter", "quantized"),
    "What merging cost": ("merged", "adapter"),
}
LANGUAGES = {"en": "English", "other": "Other languages"}


def metrics_table(evaluations: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Metrics (fp64, NaN if missing) by variant (rows)."""
    columns = [*METRICS, *COUNTS, *(m.count for m in METRICS.values() if m.count)]
    table = pd.DataFrame.from_dict({v: dict(m) for v, m in evaluations.items()}, orient="index")
    return table.reindex(index=list(evaluations), columns=columns).astype(float)


def exported_rows(export: Mapping[str, Any]) -> pd.DataFrame:
    """`metrics_table` of exported files, which reply to nothing, by `exported <format>` (rows)."""
    formats = {f"exported {name}": m for name, m in export.items() if isinstance(m, Mapping)}
    return metrics_table(formats)


def language_tables(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
    """Language → `metrics_table`, for languages that every variant was scored on."""
    parts = {variant: metrics.get("by_language") or {} for variant, metrics in evaluations.items()}
    common = [key for key in LANGUAGES if all(key in part for part in parts.values())]
    return {LANGUAGES[k]: metrics_table({v: part[k] for v, part in parts.items()}) for k in common}


def part_losses(evaluations: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Held-out loss (nats a token) of each source and role, where there are several, by variant."""
    items = evaluations.items()
    rows = {
        f"{label} {name}": {v: (m.get(key) or {}).get(name, {}).get("loss") for v, m in items}
        for key, label in (("by_source", "Source"), ("by_role", "Role"))
        for names in [sorted({name for _, m in items for name in m.get(key) or {}})]
        for name in (names if len(names) > 1 else ())
    }
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Differences of metrics (columns), later minus earlier, for each of `CHANGES` (rows)."""
    rows = {name: table.loc[new] - table.loc[old] for name, (new, old) in CHANGES.items()}
    return pd.DataFrame(rows).T[list(METRICS)]


def noise(table: pd.DataFrame) -> pd.DataFrame:
    """Two standard errors of each of `changes`; 0 for metrics that are no fractions.

    An upper bound: samples count as independent, but the prompts are the same.
    """
    variance = pd.DataFrame(0.0, index=table.index, columns=list(METRICS))
    for name, metric in METRICS.items():
        if metric.count:
            variance[name] = table[name] * (1 - table[name]) / table[metric.count]
    variance = variance.fillna(0.0)
    rows = {name: variance.loc[new] + variance.loc[old] for name, (new, old) in CHANGES.items()}
    return 2 * np.sqrt(pd.DataFrame(rows).T)


def verdict(metric: str, change: float, noise: float = 0.0) -> str:
    """`better`, `worse`, or empty for a change below the noise or below 0.001."""
    if pd.isna(change) or abs(change) < max(1e-3, noise):
        return ""
    return "better" if change * METRICS[metric].sign > 0 else "worse"


def join_answers(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Variant → answer of each prompt, in order, without variants that have none."""
    columns = {}
    for variant, rows in answers.items():
        frame = pd.DataFrame({"prompt": [repr(row.get("prompt")) for row in rows], "row": rows})
        occurrence = frame.groupby("prompt").cumcount()  # prompts may repeat
        columns[variant] = frame.set_index(["prompt", occurrence])["row"]
    joined = pd.concat(columns, axis=1, sort=False)
    return [row.dropna().to_dict() for _, row in joined.iterrows()]


def is_wrong(prompt: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the merged model's answer is wrong."""
    return prompt.get("merged", {}).get("correct") is False


def select(prompts: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """First `count` prompts that the merged model answers wrongly, then the first of all."""
    wrong = [prompt for prompt in prompts if is_wrong(prompt)][:count]
    return wrong + [prompt for prompt in prompts[:count] if prompt not in wrong]
