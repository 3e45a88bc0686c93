"""Metrics of the four variants: how they are written, their tables, changes and answers."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Undefined

MISSING = "–"
NO_BREAK = "\N{NO-BREAK SPACE}"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1}


def is_missing(item: Any) -> bool:
    """Whether it is None, NaN or a key that its file lacks."""
    return item is None or isinstance(item, Undefined) or (np.isscalar(item) and pd.isna(item))


def number(item: Any, digits: int = 4, sign: str = "-", unit: str = "") -> str:
    """`1,234.5678`; a dash if missing; zero has no sign."""
    if is_missing(item):
        return MISSING
    zero = round(item, digits) == 0
    text = f"{0.0 if zero else item:{'-' if zero else sign},.{digits}f}"
    return text.replace("-", "−") + unit


def signed(item: Any, digits: int = 4) -> str:
    """`+0.1234`."""
    return number(item, digits, sign="+")


def percent(fraction: Any, digits: int = 1) -> str:
    """A fraction as `62.5 %`."""
    return MISSING if is_missing(fraction) else number(100 * fraction, digits, unit=f"{NO_BREAK}%")


def points(change: Any) -> str:
    """Change of a fraction in percentage points, `+12.5`."""
    return MISSING if is_missing(change) else signed(100 * change, 1)


def size(count: Any) -> str:
    """Bytes in decimal units, `98.4 MB`."""
    if is_missing(count):
        return MISSING
    unit = next(unit for unit, scale in UNITS.items() if count >= scale or unit == "B")
    return number(count / UNITS[unit], {"GB": 2, "B": 0}.get(unit, 1), unit=NO_BREAK + unit)


def value(item: Any, key: str = "") -> str:
    """A scalar or list by its type; a size if the key ends in `bytes`."""
    if is_missing(item):
        return MISSING
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int | float) and key.endswith("bytes"):
        return size(item)
    if isinstance(item, float) and 0 < abs(item) < 1e-3:
        return scientific(item)
    if isinstance(item, int | float):
        return f"{item:,}" if isinstance(item, int) else f"{item:,.6g}".replace("-", "−")
    return ", ".join(map(value, item)) if isinstance(item, list) else str(item)


def words(key: str) -> str:
    """`RTX_4090_24GiB` as `RTX 4090 24 GiB`."""
    return key.replace("_", " ").replace("GiB", f"{NO_BREAK}GiB")


def scientific(item: Any) -> str:
    """`1.2 × 10⁻⁵`; a dash if missing; zero is `0`."""
    if is_missing(item) or not item:
        return MISSING if is_missing(item) else "0"
    mantissa, exponent = f"{item:.1e}".split("e")
    raised = str(int(exponent)).translate(RAISED)
    return f"{mantissa.replace('-', '−')}{NO_BREAK}×{NO_BREAK}10{raised}"


def yaml_value(item: Any) -> str:
    """A parameter as params.yaml spells it, approximately."""
    if isinstance(item, list):
        return ", ".join(map(yaml_value, item))
    return json.dumps(item) if item is None or isinstance(item, bool) else str(item)


def flat(nested: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → scalar or list, in the order of the file."""
    if not isinstance(nested, dict):
        return {prefix: nested}
    parts = [flat(item, f"{prefix}.{key}".lstrip(".")) for key, item in nested.items()]
    return {key: item for part in parts for key, item in part.items()}


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


def is_wrong(prompt: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the merged model's answer is wrong."""
    return prompt.get("merged", {}).get("correct") is False


def select(prompts: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """First `count` prompts that the merged model answers wrongly, then the first of all."""
    wrong = [prompt for prompt in prompts if is_wrong(prompt)][:count]
    return wrong + [prompt for prompt in prompts[:count] if prompt not in wrong]
