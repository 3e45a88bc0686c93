"""The plan for a terminal."""

from collections.abc import Mapping
from typing import Any

from stages.shared.fitting import GIB

PARTS = ("weights", "gradients", "optimizer", "activations", "rest", "total")


def techniques(plan: Mapping[str, Any]) -> str:
    """A line a technique: its parts, its peak, and the cards that it fits."""
    ways = plan["techniques"]
    largest = max(way["peak_bytes"] for way in ways.values())
    unit, scale = ("GB", 1e9) if largest >= 1e10 else ("MB", 1e6)
    cards = list(next(iter(ways.values()))["fits"])
    tokens = plan["micro_batch"]["tokens"]
    head = f"{f'peak, {unit}, {tokens:,} tokens':36}" + "".join(f"{part:>12}" for part in PARTS)
    lines = [f"{head}  {' '.join(_short(card) for card in cards)}"]
    for name, way in ways.items():
        cells = "".join(f"{size / scale:>12,.2f}" for size in _cells(way))
        fits = " ".join(_mark(way, card).center(len(_short(card))) for card in cards)
        lines.append(f"{name:36}{cells}  {fits}")
    notes = ["weights: the adapter's too; rest: logits, dequantized matrices, casts of autocast"]
    if not all(way["calibrated"] for way in ways.values()):
        notes.append("uncalibrated: upper ends of a range, this kind of model was not measured;")
        for name, way in ways.items():
            low, high = way["peak_at_least_bytes"] / scale, way["peak_bytes"] / scale
            if not way["calibrated"]:
                notes.append(f"  {name}: {low:,.2f} to {high:,.2f}")
    return "\n".join([*lines, *notes])


def configured(plan: Mapping[str, Any]) -> str:
    """A line a card: what params.yaml's training would be computed with there."""
    lines = ["params.yaml as it is"]
    for card, found in plan["configured_on"].items():
        bf16 = found["instead_of_bf16"]
        needs = f"; it has no bf16: set {bf16}" if bf16 else ""
        lines.append(f"  {card.replace('_', ' '):18} {choice(found)}{needs}")
    return "\n".join(lines)


def choice(found: Mapping[str, Any]) -> str:
    """How a step would be computed, in words."""
    needed = f"{found['peak_bytes'] / GIB:.2f} GiB"
    if not found["fits"]:
        return f"does not fit: {needed} at the least"
    checkpointing = "on" if found["gradient_checkpointing"] else "off"
    return (
        f"{needed}: micro-batches of {found['micro_batch_tokens']:,} tokens, "
        f"gradient checkpointing {checkpointing}"
    )


def disk(plan: Mapping[str, Any]) -> str:
    """One line: what a run writes."""
    sizes = plan["disk"]
    names = ("base", "quantized", "adapter", "merged", "resume_state", "cache")
    listed = ", ".join(f"{n.replace('_', ' ')} {sizes[f'{n}_bytes'] / 1e9:,.2f}" for n in names)
    return f"disk, GB: {listed}"


def _cells(way: Mapping[str, Any]) -> list[int]:
    return [
        way["weights_bytes"] + way["adapter_bytes"],
        way["gradients_bytes"],
        way["optimizer_bytes"],
        way["activations_bytes"],
        way["logits_bytes"] + way["workspace_bytes"],
        way["peak_bytes"],
    ]


def _mark(way: Mapping[str, Any], card: str) -> str:
    return "✓" if way["fits"][card] else "×"


def _short(card: str) -> str:
    """`RTX_3090_24GiB` → `3090/24`."""
    model, _, memory = card.rpartition("_")
    return f"{model.rpartition('_')[2]}/{memory.removesuffix('GiB')}"
