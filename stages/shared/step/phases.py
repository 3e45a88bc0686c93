"""Phases of a step, by the block whose pass runs, and their peaks in a model of all blocks."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from stages.shared.step.architecture import Pattern
from stages.shared.step.live_bytes import LiveBytes


def follow(live: LiveBytes, blocks: Sequence[nn.Module]) -> None:
    """Name the phase: `forward 0`, …, `loss`, …, `backward 0`."""

    def enters(index: int) -> Any:
        def hook(*_: Any) -> None:
            if not live.phase.startswith("backward"):  # where it is computed again
                live.phase = f"forward {index}"

        return hook

    def leaves(index: int) -> Any:
        def goes_back(_: Any) -> None:
            live.phase = f"backward {index}"

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if live.phase.startswith("backward"):
                return
            if index == len(blocks) - 1:
                live.phase = "loss"
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(goes_back)

        return hook

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(enters(index))
        block.register_forward_hook(leaves(index))


def extended(live: LiveBytes, held: int, pattern: Pattern) -> dict[str, dict[str, int]]:
    """The peak of each phase in a model of all blocks: transient bytes by part."""
    last = pattern.run - 1

    def of_period(births: dict[str, int]) -> int:
        names = (f"{way} {i}" for i in pattern.repeated for way in ("forward", "backward"))
        return pattern.repeats * sum(births.get(name, 0) for name in names)

    peaks = {}
    for phase, (total, births) in live.peaks.items():
        way, _, number = phase.partition(" ")
        index = int(number) if number.isdigit() else last
        if phase == "held":
            continue
        if way == "forward" and index < pattern.start:
            more = 0
        elif way == "forward":  # what only waits for Python to leave a block counts once
            more = of_period(live.peaks["loss"][1])
        elif way == "backward" and index in pattern.repeated:
            more = of_period(live.peaks[f"backward {last}"][1])
        else:
            more = of_period(births)
        logits, workspace = births.get("logits", 0), births.get(phase, 0)
        activations = total - held - logits - workspace + more
        peaks[phase] = {"activations": activations, "logits": logits, "workspace": workspace}
    return peaks


def in_words(phase: str, pattern: Pattern) -> str:
    """A phase with its block's number in the whole model, from 1."""
    way, _, number = phase.partition(" ")
    if not number.isdigit():
        return phase
    index = int(number)
    index += pattern.repeats * pattern.period if index >= pattern.start else 0
    return f"{way} pass of block {index + 1} of {pattern.layers}"
