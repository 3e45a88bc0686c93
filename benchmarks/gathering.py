"""Gathering of sharded weights against compute, by calculation: no device is measured.

Run:    python -m benchmarks.gathering
"""

import pandas as pd

from benchmarks.common import ROOT, publish
from benchmarks.memory import Setting
from stages.plan.config import CONFIGS, Data
from stages.plan.figures import operations
from stages.shared.core.command import run
from stages.shared.step.memory.predict import StepCounter

PAGE = ROOT / "docs/clusters.md"
TOKENS = (1024, 8192)  # of a micro-batch, in conversations of 1,024, half of them supervised
UTILIZATION = 0.4  # of the dense bf16 peak, an assumption
# Bytes a second that a device receives, and FLOP/s of its peak: PCIe 4.0 x16, and NVLink 4.
LINKS = {"RTX 4090, PCIe 4": (25e9, 165e12), "H100, NVLink 4": (400e9, 989e12)}


def main() -> None:
    """Publish a row for each model, link and number of devices."""
    rows = []
    counts = Data(1, 1024, 512, 1024)
    setup = Setting("nf4", 16, True, (1024,)).setup("cuda")
    for name in ("Llama-3-8B", "Llama-3-70B"):
        with StepCounter(CONFIGS / f"{name}.json") as counter:
            held = counter.persistent(setup)
            cost = sum(operations(counter, setup, counts).values())
        whole = 2 * held["blocks"] + held["embedding"] + held["head"]
        for (link, (rate, peak)), devices in zip(LINKS.items(), (2, 8), strict=True):
            received = whole * (devices - 1) / devices
            for tokens in TOKENS:
                gathering, computing = received / rate, tokens * cost / (UTILIZATION * peak)
                times = (f"{x:.2f}" for x in (gathering, computing, gathering / computing))
                where = (f"{devices} × {link}", f"{tokens:,}", f"{received / 1e9:.1f}")
                rows.append((name, *where, *times))
    columns = ["model, nf4", "devices", "tokens", "received, GB", "gathering, s", "computing, s"]
    table = pd.DataFrame(rows, columns=[*columns, "ratio"])
    how = f"Computed: rank 16, checkpointed, {UTILIZATION:.0%} of the peak FLOP/s."
    publish("gathering", table, how, PAGE)


if __name__ == "__main__":
    run(main)
