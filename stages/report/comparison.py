"""The four models side by side, and the three differences between them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

METRICS = ("loss", "perplexity", "bits_per_byte", "exact_match", "stop_rate")
LOWER_IS_BETTER = {"loss", "perplexity", "bits_per_byte"}
DIFFERENCES = (
    ("What quantization cost", "quantized", "base"),
    ("What training gained", "adapter", "quantized"),
    ("What merging cost", "merged", "adapter"),
)
# Metrics that are shares, and of how many replies.
SHARES = {"exact_match": "answered_rows", "stop_rate": "generated_rows"}
LANGUAGES = {"en": "English", "other": "Other languages"}


@dataclass(frozen=True)
class Difference:
    """One model's metrics minus another's.

    Attributes:
        name: what it is the difference of.
        later: the one model.
        earlier: the other.
        values: by metric; None where either has none.
        noise: by metric, what a difference of two shares may be by chance.
    """

    name: str
    later: str
    earlier: str
    values: dict[str, float | None]
    noise: dict[str, float]


def difference(later: float | None, earlier: float | None) -> float | None:
    """`later - earlier`, or None where one of them is missing."""
    return None if later is None or earlier is None else later - earlier


def differences(evaluations: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    """What quantization cost, what training gained, what merging cost."""
    return [
        Difference(
            name,
            later,
            earlier,
            {
                metric: difference(evaluations[later].get(metric), evaluations[earlier].get(metric))
                for metric in METRICS
            },
            {m: noise(m, evaluations[later], evaluations[earlier]) for m in METRICS},
        )
        for name, later, earlier in DIFFERENCES
    ]


def noise(metric: str, *evaluations: Mapping[str, Any]) -> float:
    """Twice the standard error of a difference of two shares; 0 of what is no share.

    As of two independent draws: the replies are to the same prompts, so that it is rather less.
    """
    variance = 0.0
    for found in evaluations:
        share, count = found.get(metric), found.get(SHARES.get(metric, ""))
        variance += share * (1 - share) / count if count and share is not None else 0.0
    return float(2 * variance**0.5)


def verdict(metric: str, change: float | None, noise: float = 0.0) -> str:
    """`better`, `worse`, or nothing for a change within the noise, or under a thousandth."""
    if change is None or abs(change) < max(1e-3, noise):
        return ""
    return "better" if (change < 0) == (metric in LOWER_IS_BETTER) else "worse"


def by_language(
    evaluations: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, dict[str, Mapping[str, Any]]]]:
    """(language, metrics by variant), for the languages that there are rows of."""
    return [
        (label, {v: metrics["by_language"][key] for v, metrics in evaluations.items()})
        for key, label in LANGUAGES.items()
        if all(key in (metrics.get("by_language") or {}) for metrics in evaluations.values())
    ]


@dataclass(frozen=True)
class Prompt:
    """A fixed prompt and what each variant answered; None where one was not asked."""

    messages: Sequence[Mapping[str, str]]
    reference: str | None
    expected: str | None
    language: str | None
    answers: dict[str, Mapping[str, Any] | None]


def prompts(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Prompt]:
    """The fixed prompts in their order, with all answers to each.

    Variants are joined by what was asked, so that an answer never stands beside another question.
    """
    asked: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for variant, shown in answers.items():
        times: Counter[str] = Counter()
        for answer in shown:
            question = repr(answer.get("prompt"))
            asked.setdefault((question, times[question]), {})[variant] = answer
            times[question] += 1  # two conversations may begin alike
    return [
        Prompt(
            messages=first.get("prompt") or [],
            reference=first.get("reference"),
            expected=first.get("expected"),
            language=first.get("language"),
            answers={variant: given.get(variant) for variant in answers},
        )
        for given in asked.values()
        for first in [next(iter(given.values()))]
    ]
