"""The plan for a terminal: what fits first, then its parts."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from stages.plan.techniques import BYTES_ALONE, CARDS_GIB
from stages.shared.step.limits import GIB


def cards(plan: Mapping[str, Any]) -> str:
    """A line a card: how params.yaml's training would be computed there, and what fits."""
    rows = {}
    for card, found in plan["configured_on"].items():
        bf16 = found["instead_of_bf16"]
        needs = f"; no bf16: set {bf16}" if bf16 else ""
        needs += "; bytes alone" if card in BYTES_ALONE else ""
        fitting = [name for name, way in plan["techniques"].items() if way["fits"][card]]
        standard = [name for name in fitting if name != "configured"]
        rows[_name(card)] = {
            "params.yaml": choice(found) + needs,
            "techniques that fit": f"{standard[0]} and below" if standard else "none",
        }
    return f"what fits\n{_table(rows)}"


def techniques(plan: Mapping[str, Any]) -> str:
    """A line a technique: the smallest card that holds it, its peak, and its parts."""
    ways = plan["techniques"]
    unit, scale = unit_of(max(way["peak_bytes"] for way in ways.values()))
    rows = {
        name: {"fits from": smallest_card(way)}
        | {part: f"{size / scale:,.2f}" for part, size in _cells(way).items()}
        for name, way in ways.items()
    }
    lines = [
        f"peak of a step with micro-batches of {plan['micro_batch']['tokens']:,} tokens, {unit}",
        _table(rows),
        "weights: the adapter's too; rest: logits, and temporaries of the phase of the peak",
    ]
    bounds = [name for name, way in ways.items() if way["upper_bound"]]
    if bounds:
        lines.append(f"upper bound, as outliers depend on values: {', '.join(bounds)}")
    lines += [f"left out: {name}: {reason}" for name, reason in plan["left_out"].items()]
    return "\n".join(lines)


def disk(plan: Mapping[str, Any]) -> str:
    """One line: bytes that a run writes."""
    sizes = plan["disk"]
    names = ("base", "quantized", "adapter", "merged", "resume_state", "cache")
    listed = ", ".join(f"{n.replace('_', ' ')} {sizes[f'{n}_bytes'] / 1e9:,.2f}" for n in names)
    return f"disk, GB: {listed}"


def choice(found: Mapping[str, Any]) -> str:
    """How a step would be computed, in words."""
    needed = f"{found['peak_bytes'] / GIB:.2f} GiB"
    if not found["fits"]:
        return f"does not fit: {needed} at the least"
    checkpointed = ", checkpointed" if found["gradient_checkpointing"] else ""
    return f"{needed}: micro-batches of {found['micro_batch_tokens']:,} tokens{checkpointed}"


def smallest_card(way: Mapping[str, Any]) -> str:
    """Memory of the smallest card that holds a technique: `16 GiB`, or `none`."""
    fitting = [CARDS_GIB[card] for card, fits in way["fits"].items() if fits]
    return f"{min(fitting)} GiB" if fitting else "none"


def unit_of(largest: int) -> tuple[str, float]:
    """GB or MB, and its bytes."""
    return ("GB", 1e9) if largest >= 1e10 else ("MB", 1e6)


def _cells(way: Mapping[str, Any]) -> dict[str, int]:
    return {
        "peak": way["peak_bytes"],
        "weights": way["weights_bytes"] + way["adapter_bytes"],
        "gradients": way["gradients_bytes"],
        "optimizer": way["optimizer_bytes"],
        "activations": way["activations_bytes"],
        "rest": way["logits_bytes"] + way["workspace_bytes"],
    }


def _name(card: str) -> str:
    return card.replace("_", " ").replace("GiB", " GiB")


def _table(rows: Mapping[str, Mapping[str, str]]) -> str:
    table = pd.DataFrame.from_dict(rows, orient="index").to_string(justify="right")
    return "\n".join(f"  {line}" for line in table.splitlines())
