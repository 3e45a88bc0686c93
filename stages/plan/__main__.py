"""What full tuning, LoRA and QLoRA of this model keep in memory, for named cards.

Reads:  models/base/config.json, reports/prepare.json
Writes: reports/plan.json, reports/plan.svg
Run:    python -m stages.plan

A pure function of the parameters, the config and the counts of `prepare`: nothing is measured, and
nothing of this machine is looked at. Activations, logits and workspaces are not counted yet, so the
figures are called `persistent`.
"""

import json
from pathlib import Path
from typing import Any

from stages.plan import figures, picture
from stages.plan.settings import Params
from stages.shared import files, params
from stages.shared.errors import UserError, run

CONFIG = Path("models/base/config.json")
COUNTS = Path("reports/prepare.json")
PLAN = Path("reports/plan.json")
PICTURE = Path("reports/plan.svg")


def read_counts(path: Path) -> dict[str, Any]:
    """What `prepare` counted.

    Raises:
        UserError: it is not there, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise UserError(
            f"{path}: missing or not JSON; expected what `prepare` counted; run `dvc repro prepare`"
        ) from None


def table(plan: dict[str, Any]) -> str:
    """The techniques for a terminal, a line each, in MB or GB."""
    ways = plan["techniques"]
    largest = max(way["persistent_bytes"] for way in ways.values())
    unit, scale = ("GB", 1e9) if largest >= 1e10 else ("MB", 1e6)
    parts = ("weights", "adapter", "gradients", "optimizer", "persistent")
    lines = [f"{f'persistent memory, {unit}':24}" + "".join(f"{part:>12}" for part in parts)]
    for name, way in ways.items():
        cells = "".join(f"{way[f'{part}_bytes'] / scale:>12,.2f}" for part in parts)
        lines.append(f"{name:24}{cells}")
    return "\n".join([*lines, "activations and logits come on top and are not counted yet"])


def main() -> None:
    """Count, write, draw, print."""
    values = params.load(Params, "plan")
    counts = read_counts(COUNTS)
    from stages.shared.architecture import model_of_config  # noqa: PLC0415  (seconds of imports)

    plan = figures.plan(model_of_config(CONFIG).tensors, counts, values)
    picture.draw(plan["techniques"], PICTURE)
    files.write_json(PLAN, plan)
    print(table(plan))


if __name__ == "__main__":
    run(main)
