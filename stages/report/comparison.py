"""Comparison of the four variants: their metrics, what changed between them, and their answers."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stages.report.formats import number, percent, points, signed


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


def metrics_table(evaluations: Mapping[str, Any]) -> pd.DataFrame:
    """Metrics (fp64, NaN if missing) by variant (rows); what is no mapping has no row."""
    rows = {variant: dict(m) for variant, m in evaluations.items() if isinstance(m, Mapping)}
    columns = [*METRICS, *COUNTS, *(m.count for m in METRICS.values() if m.count)]
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.reindex(index=list(rows), columns=columns).astype(float)


def language_tables(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Language → rows of `metrics_table`, for languages that every variant was scored on."""
    parts = {variant: metrics.get("by_language") or {} for variant, metrics in evaluations.items()}
    common = [key for key in LANGUAGES if all(key in part for part in parts.values())]
    rows = {key: {variant: part[key] for variant, part in parts.items()} for key in common}
    return {LANGUAGES[key]: metrics_table(rows[key]).to_dict("index") for key in common}


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

    By the pooled share: 0 of 1 and 1 of 1 have no variance of their own. An upper bound: samples
    count as independent, but the prompts are the same.
    """
    variance = pd.DataFrame(0.0, index=list(CHANGES), columns=list(METRICS))
    for name, metric in METRICS.items():
        if metric.count:
            count = table[metric.count].replace(0, np.nan)
            for change, pair in CHANGES.items():
                n = count[[*pair]]
                share = (table[name] * count)[[*pair]].sum() / n.sum(skipna=False)
                variance.loc[change, name] = share * (1 - share) * (1 / n).sum(skipna=False)
    return 2 * np.sqrt(variance.fillna(0.0))


def verdict(metric: str, change: float, noise: float = 0.0) -> str:
    """`better`, `worse`, or empty for a change below the noise or below 0.001."""
    if pd.isna(change) or abs(change) < max(1e-3, noise):
        return ""
    return "better" if change * METRICS[metric].sign > 0 else "worse"


def join_answers(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Variant → answer of each prompt, in order, without variants that have none."""
    joined: dict[tuple[str, int], dict[str, Any]] = {}
    for variant, rows in answers.items():
        seen = Counter[str]()  # prompts may repeat
        for row in rows:
            prompt = repr(row.get("prompt"))
            joined.setdefault((prompt, seen[prompt]), {})[variant] = row
            seen[prompt] += 1
    return list(joined.values())


def select(prompts: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """First `count` prompts that the merged model answers wrongly, then the first of all."""
    wrong = [prompt for prompt in prompts if merged_is_correct(prompt) is False][:count]
    return wrong + [prompt for prompt in prompts[:count] if prompt not in wrong]


def merged_is_correct(prompt: Mapping[str, Mapping[str, Any]]) -> bool | None:
    """Whether the merged model's answer is right; None if the right one is unknown."""
    return prompt.get("merged", {}).get("correct")
