"""Terminal tables of the plan."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from stages.plan.figures import BYTES_ALONE, CARDS_GIB
from stages.shared.parallel.placement import GIB

ON_DISK = ("base", "quantized", "adapter", "merged", "resume_state", "cache")


def model(plan: Mapping[str, Any]) -> str:
    """Parameters as one line; of a mixture also those that a token uses, which take the time."""
    total, active = (plan["model"][name] / 1e9 for name in ("parameters", "active"))
    share = f", of them {active:,.2f} active for a token" if active < total else ""
    return f"parameters, 10⁹: {total:,.2f}{share}"


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
    return f"what fits\n{indented(pd.DataFrame(rows).T)}"


def devices(plans: Mapping[str, Any]) -> str:
    """Table of several devices: memory of each, with all weights or with its part of them."""
    table = pd.DataFrame(plans).map(choice).T
    return f"params.yaml on several devices, memory of each\n{indented(table)}"


def techniques(plan: Mapping[str, Any]) -> str:
    """Table of techniques: smallest card, peak, and its parts."""
    ways = pd.DataFrame(plan["techniques"]).T
    unit, scale = unit_of(ways["peak_bytes"].max())
    sizes = {
        "peak": ways["peak_bytes"],
        "weights": ways["weights_bytes"] + ways["adapter_bytes"],
        "gradients": ways["gradients_bytes"],
        "optimizer": ways["optimizer_bytes"],
        "activations": ways["activations_bytes"],
        "rest": ways["logits_bytes"] + ways["workspace_bytes"],
    }
    table = pd.DataFrame({"fits from": ways["fits"].map(smallest_card)})
    lines = [
        f"peak of a step with micro-batches of {plan['micro_batch']['tokens']:,} tokens, {unit}",
        indented(table.assign(**{n: (x / scale).map("{:,.2f}".format) for n, x in sizes.items()})),
        "weights: the adapter's too; rest: logits, and temporaries of the phase of the peak",
    ]
    bounds = [name for name, way in plan["techniques"].items() if way["upper_bound"]]
    if bounds:
        lines.append(f"upper bound, as outliers depend on values: {', '.join(bounds)}")
    lines += [f"left out: {name}: {reason}" for name, reason in plan["left_out"].items()]
    return "\n".join(lines)


def disk(plan: Mapping[str, Any]) -> str:
    """Bytes on disk, as one line."""
    sizes = ((name, plan["disk"][f"{name}_bytes"] / 1e9) for name in ON_DISK)
    return "disk, GB: " + ", ".join(f"{name.replace('_', ' ')} {size:,.2f}" for name, size in sizes)


def choice(chosen: Mapping[str, Any]) -> str:
    """The execution plan of a step, in words."""
    needed = f"{chosen['peak_bytes'] / GIB:.2f} GiB"
    if not chosen["fits"]:
        return f"does not fit: {needed} at the least"
    checkpointed = ", checkpointed" if chosen["gradient_checkpointing"] else ""
    return f"{needed}: micro-batches of {chosen['micro_batch_tokens']:,} tokens{checkpointed}"


def smallest_card(fits: Mapping[str, bool]) -> str:
    """Memory of the smallest card that holds a technique: `16 GiB`, or `none`."""
    fitting = [CARDS_GIB[card] for card in fits if fits[card]]
    return f"{min(fitting)} GiB" if fitting else "none"


def unit_of(largest: int) -> tuple[str, float]:
    """GB or MB, and its bytes."""
    return ("GB", 1e9) if largest >= 1e10 else ("MB", 1e6)


def indented(table: pd.DataFrame) -> str:
    """A table as text, two columns in."""
    return "  " + table.to_string(justify="right").replace("\n", "\n  ")
