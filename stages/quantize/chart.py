"""Chart of the 4-bit codebooks under the histogram of one layer's weights."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from stages.quantize.quantization_error import QuantizationError, blocks, codebooks, normalize
from stages.shared.core import files

BINS = 120
LINEAR = {"linear4_clipped": "linear, clipped", "linear4_absmax": "linear"}
LABELS = {"nf4": "nf4", **LINEAR, "fp4": "fp4"}


def draw(path: Path, name: str, weight: torch.Tensor, measured: QuantizationError) -> None:
    """Draw the histogram of a weight, fp32 [out, in], over the codebooks, the best first."""
    fractions = normalize(blocks(weight)).flatten()
    density = torch.histc(fractions.cpu(), bins=BINS, min=-1, max=1) / len(fractions) * BINS / 2
    edges = torch.linspace(-1, 1, BINS + 1)
    colors = {kind: f"C{index}" for index, kind in enumerate(LABELS)}
    ranked = sorted(LABELS, key=lambda kind: measured.errors[kind])
    levels = codebooks(measured.clip)
    figure = Figure(figsize=(9.0, 4.8))
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    top.stairs(density.numpy(), edges.numpy(), fill=True, color="C5", alpha=0.45)
    top.set_title(f"Four bits for {name.removesuffix('.weight')}", loc="left")
    top.set_ylabel("density of its weights")
    below.set_ylabel("levels")
    top.tick_params(labelbottom=False)
    for row, kind in enumerate(ranked):
        label = f"{LABELS[kind]}: {measured.errors[kind]:.2%}"
        style = {"linelengths": 0.6, "linewidths": 2, "color": colors[kind]}
        below.eventplot(levels[kind], lineoffsets=-row, label=label, **style)
    below.set_yticks([-row for row in range(len(ranked))], [LABELS[kind] for kind in ranked])
    below.grid(visible=False, axis="y")
    below.set_xlabel("weight, as a fraction of the largest magnitude in its block of 64")
    figure.legend(title="relative error,\nwhole model", loc="outside right upper")
    with files.whole_file(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
