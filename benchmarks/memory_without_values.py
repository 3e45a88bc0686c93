"""Predicted memory of a GPU's training step against the same step on tensors without values.

Reads:  the shipped configs (sizes only)
Writes: the table of a GPU's steps in docs/memory.md
Run:    python -m benchmarks.memory_without_values

About two minutes, anywhere: see `benchmarks.without_values`. The rank is 16; all is learnt but the
first token of each conversation.
"""

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from benchmarks import without_values
from benchmarks.memory_cuda import predict
from benchmarks.page import put
from benchmarks.training_step import Setting
from stages.plan.named import CONFIGS
from stages.shared.architecture import model_of_config
from stages.shared.core import progress
from stages.shared.fitting import GIB

PAGE = Path("docs/memory.md")
MODELS = ("Qwen1.5-0.5B", "Llama-2-7B", "Mistral-7B", "Llama-3-8B", "Llama-3-70B")
PACKED, SHORT, LONG = (2048,) * 4, (512, 300), (32_768,)
PROMISED = 0.001


@dataclass(frozen=True)
class Row:
    """One step, in bytes."""

    model: str
    setting: Setting
    predicted: int
    counted: int
    instant: str

    @property
    def error(self) -> float:
        """(predicted - counted) / counted."""
        return self.predicted / self.counted - 1


def settings() -> Iterator[Setting]:
    """What is counted of each model."""
    for lengths, checkpointed in (
        (PACKED, False),
        (PACKED, True),
        (SHORT, False),
        (LONG, True),
    ):
        yield Setting("nf4", 16, checkpointed, lengths, supervised=1.0)


def row_of(name: str, setting: Setting) -> Row:
    """Predict, then count."""
    config = CONFIGS / f"{name}.json"
    predicted = predict(model_of_config(config), setting)
    counted = without_values.measure(AutoConfig.from_pretrained(config), setting)
    return Row(name, setting, predicted.total_bytes, counted.peak_bytes, predicted.instant)


def table(rows: Sequence[Row]) -> str:
    """As Markdown, and a line of all errors."""
    lines = [
        "| model | checkpointed | tokens | counted, GiB | predicted, GiB | error | peak |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        setting = row.setting
        lines.append(
            f"| {row.model} | {'yes' if setting.gradient_checkpointing else 'no'} | "
            f"{setting.tokens:,} | {row.counted / GIB:.2f} | {row.predicted / GIB:.2f} | "
            f"{row.error:+.2%} | {row.instant} |"
        )
    errors = [row.error for row in rows]
    lines += [
        "",
        f"{len(rows)} steps: median error {statistics.median(map(abs, errors)):.3%}, from "
        f"{min(errors):+.3%} to {max(errors):+.3%}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Count, print, write; fail where the planner is off by more than it promises."""
    wanted = [(name, setting) for name in MODELS for setting in settings()]
    with progress.bar(total=len(wanted), desc="memory", unit="step") as bar:
        rows = []
        for name, setting in wanted:
            rows.append(row_of(name, setting))
            bar.update()
    print(table(rows))
    put("a GPU's steps", table(rows), PAGE)
    if max(abs(row.error) for row in rows) > PROMISED:
        sys.exit(f"error: promised was an error of {PROMISED:.1%} at the most")


if __name__ == "__main__":
    main()
