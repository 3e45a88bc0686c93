"""Predict memory, disk and operations of full fine-tuning, LoRA and QLoRA on named cards.

Reads:  models/base/config.json, reports/prepare.json
Writes: reports/plan.json, reports/plan.svg
Run:    python -m stages.plan
        python -m stages.plan --model Llama-3-8B --budget 16 --max-length 2048
        python -m stages.plan --model Llama-3-70B --devices 4
        python -m stages.plan --model owner/name --set lora.r=64 --set quantize.precision=bf16

The files depend on parameters, config and counts alone, and are not written with any option.
Figures of this machine are only printed, and not under DVC.
"""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from stages.plan.config import Params, changed, config_path, data_of, shipped
from stages.shared.core import files, params
from stages.shared.core.command import quick_imports, run
from stages.shared.core.errors import UserError

PLAN = Path("reports/plan.json")
PICTURE = Path("reports/plan.svg")
MOST_GIB = 10**9
MOST_TOKENS = 10**6  # a count of more takes minutes
MOST_DEVICES = 1024  # as QLORA_DEVICES


def add_options(parser: ArgumentParser) -> None:
    """Another model, budget, length or parameter; without any, this is the stage."""
    known = f"a folder with a config.json, such a file, owner/name[@commit], or: {shipped()}"
    parser.add_argument("--model", help=known)
    parser.add_argument("--budget", type=float, help="GiB; this machine's memory if left out")
    parser.add_argument("--max-length", type=int, help="tokens of the longest conversation")
    help_devices = "devices that train together, each with all weights or a part"
    parser.add_argument("--devices", type=int, help=help_devices)
    parser.add_argument("--picture", type=Path, help="where to draw the plan, as SVG")
    help_set = "a parameter of quantize, lora or train, for this plan alone; may be repeated"
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help=help_set)


def check(options: Namespace) -> None:
    """Refuse options out of range."""
    for name, least, most, unit in (
        ("budget", 1e-9, MOST_GIB, "GiB"),
        ("max_length", 2, MOST_TOKENS, "tokens"),
        ("devices", 1, MOST_DEVICES, "devices"),
    ):
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: is {value:g}. Give {least:g} to {most:,} {unit}.")


def main(options: Namespace) -> None:
    """Count, write, draw and print the plan."""
    check(options)
    values = changed(params.load(Params, "plan"), options.set or ())
    config = config_path(options.model)
    counts = data_of(options.max_length, values.train.batch_size)
    # Imported late: a mistake in params.yaml is reported before the seconds that these take.
    with quick_imports():
        from stages.plan import figures, output  # noqa: PLC0415
        from stages.shared.step.memory.predict import StepCounter  # noqa: PLC0415

    is_stage = all(option is None for option in vars(options).values())
    with StepCounter(config) as counter:
        plan = figures.plan(counter, counts, values)
        if target := PICTURE if is_stage else options.picture:
            output.draw(plan, figures.growth(counter, values, counts), target)
        if is_stage:
            files.write_json(PLAN, plan)
        sections = [output.model(plan), output.cards(plan)]
        if options.devices:
            plans = figures.on_devices(counter, counts, values, options.devices)
            sections.append(output.devices(plans))
        print(*sections, output.techniques(plan), output.disk(plan), sep="\n\n")
        if "DVC_STAGE" not in os.environ:
            from stages.plan import this_machine  # noqa: PLC0415  (imports transformers)

            print()
            for line in this_machine.describe(counter, counts, values, options):
                print(line, flush=True)


if __name__ == "__main__":
    run(main, add_options)
