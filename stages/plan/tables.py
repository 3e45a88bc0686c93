"""Terminal tables of the plan."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from stages.plan.techniques import BYTES_ALONE, CARDS_GIB
from stages.shared.parallel.limits import GIB


def cards(plan: Mapping[str, Any]) -> str:
    """Table of cards: the execution plan of params.yaml, and the techniques that fit."""
    rows = {}
    for card, chosen in plan["configured_on"].items():
        bf16 = chosen["instead_of_bf16"]
        needs = f"; no bf16: set {bf16}" if bf16 else ""
        needs += "; bytes alone" if card in BYTES_ALONE else ""
        fitting = [name for name, way in plan["techniques"].items() if way["fits"][card]]
        standard = [name for name in fitting if name != "configured"]
        rows[card.replace("_", " ").replace("GiB", " GiB")] = {
            "params.yaml": choice(chosen) + needs,
            "techniques that fit": f"{standard[0]} and below" if standard else "none",
        }
    return f"what fits\n{_table(rows)}"


def devices(plans: Mapping[str, Any]) -> str:
    """Table of several devices: memory of each, with all weights or with its part of them."""
    rows = {
        size: {way: choice(chosen) for way, chosen in ways.items()} for size, ways in plans.items()
    }
    return f"params.yaml on several devices, memory of each\n{_table(rows)}"


def techniques(plan: Mapping[str, Any]) -> str:
    """Table of techniques: smallest card, peak, and its parts."""
    ways = plan["techniques"]
    unit, scale = unit_of(max(way["peak_bytes"] for way in ways.values()))
    rows = {}
    for name, way in ways.items():
        sizes = {
            "peak": way["peak_bytes"],
            "weights": way["weights_bytes"] + way["adapter_bytes"],
            "gradients": way["gradients_bytes"],
            "optimizer": way["optimizer_bytes"],
            "activations": way["activations_bytes"],
            "rest": way["logits_bytes"] + way["workspace_bytes"],
        }
        cells = {part: f"{size / scale:,.2f}" for part, size in sizes.items()}
        rows[name] = {"fits from": smallest_card(way), **cells}
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
    """Bytes on disk, as one line."""
    sizes = plan["disk"]
    names = ("base", "quantized", "adapter", "merged", "resume_state", "cache")
    listed = ", ".join(f"{n.replace('_', ' ')} {sizes[f'{n}_bytes'] / 1e9:,.2f}" for n in names)
    return f"disk, GB: {listed}"


def model(plan: Mapping[str, Any]) -> str:
    """Parameters as one line; of a mixture also those that a token uses, which take the time."""
    parameters = plan["model"]
    total, active = (parameters[name] / 1e9 for name in ("parameters", "active"))
    share = f", of them {active:,.2f} active for a token" if active < total else ""
    return f"parameters, 10⁹: {total:,.2f}{share}"


def choice(chosen: Mapping[str, Any]) -> str:
    """The execution plan of a step, in words."""
    needed = f"{chosen['peak_bytes'] / GIB:.2f} GiB"
    if not chosen["fits"]:
        return f"does not fit: {needed} at the least"
    checkpointed = ", checkpointed" if chosen["gradient_checkpointing"] else ""
    return f"{needed}: micro-batches of {chosen['micro_batch_tokens']:,} tokens{checkpointed}"


def smallest_card(way: Mapping[str, Any]) -> str:
    """Memory of the smallest card that holds a technique: `16 GiB`, or `none`."""
    fitting = [CARDS_GIB[card] for card, fits in way["fits"].items() if fits]
    return f"{min(fitting)} GiB" if fitting else "none"


def unit_of(largest: int) -> tuple[str, float]:
    """GB or MB, and its bytes."""
    return ("GB", 1e9) if largest >= 1e10 else ("MB", 1e6)


def _table(rows: Mapping[str, Mapping[str, str]]) -> str:
    table = pd.DataFrame.from_dict(rows, orient="index").to_string(justify="right")
    return "\n".join(f"  {line}" for line in table.splitlines())
