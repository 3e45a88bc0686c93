"""What full tuning, LoRA and QLoRA of this model need: memory, disk, operations, for named cards.

Reads:  models/base/config.json, reports/prepare.json
Writes: reports/plan.json, reports/plan.svg
Run:    python -m stages.plan
        python -m stages.plan --model Llama-3-8B --budget 16 --max-length 2048

What is written is a pure function of the parameters, the config and the counts of `prepare`:
nothing is measured, and nothing of this machine is looked at. What this machine fits and how long
it takes is only printed, and not under DVC. With any option these files are not written.
"""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from stages.plan import named
from stages.plan.data import Data, read_counts
from stages.plan.settings import Params
from stages.shared.core import files, params, progress
from stages.shared.core.errors import UserError, run
from stages.shared.step.adapter_sizes import of_parameters

COUNTS = Path("reports/prepare.json")
PLAN = Path("reports/plan.json")
PICTURE = Path("reports/plan.svg")
LARGEST = 10**9  # of what an option can be: beyond it, what is counted has no numbers


def add_options(parser: ArgumentParser) -> None:
    """Another model, budget or length; without any of them, this is the stage."""
    known = f"a folder with a config.json, such a file, or: {named.names()}"
    parser.add_argument("--model", help=known)
    parser.add_argument("--budget", type=float, help="GiB; this machine's memory if left out")
    parser.add_argument("--max-length", type=int, help="tokens of the longest conversation")
    parser.add_argument("--picture", type=Path, help="where to draw the plan, as SVG")


def check(options: Namespace) -> None:
    """Refuse numbers that no machine and no conversation has.

    Raises:
        UserError: names the option.
    """
    if options.budget is not None and not 0 < options.budget < LARGEST:
        raise UserError(
            f"--budget is {options.budget:g}; expected GiB, above 0 and below {LARGEST:,}"
        )
    if options.max_length is not None and not 2 <= options.max_length < LARGEST:
        raise UserError(
            f"--max-length is {options.max_length}; expected 2 tokens or more, and fewer than "
            f"{LARGEST:,}"
        )


def data_of(max_length: int | None, batch_size: int) -> Data:
    """What `prepare` counted, or one step of conversations of `max_length` tokens, all learnt."""
    if max_length is None:
        return read_counts(COUNTS)
    tokens = batch_size * max_length
    return Data(batch_size, tokens, tokens - batch_size, max_length)


def main(options: Namespace) -> None:
    """Count, write, draw, print."""
    check(options)
    values = params.load(Params, "plan")
    config = named.config_path(options.model)
    found = data_of(options.max_length, values.train.batch_size)
    # Imported late: a mistake in params.yaml is told before the seconds that torch takes.
    with progress.quick_imports():
        from stages.plan import figures, growth, here, picture, table  # noqa: PLC0415
        from stages.shared.architecture import model_of_config  # noqa: PLC0415

    model = model_of_config(config)
    plan = figures.plan(model, found, values)
    is_stage = all(option is None for option in vars(options).values())
    if where := PICTURE if is_stage else options.picture:
        adapter = of_parameters(model.tensors, values.lora)
        panels = growth.of_model(model, adapter, found.supervised_share)
        picture.draw(plan["techniques"], panels, plan["micro_batch"]["tokens"], where)
    if is_stage:
        files.write_json(PLAN, plan)
    print(table.techniques(plan), table.configured(plan), table.disk(plan), sep="\n\n")
    if "DVC_STAGE" not in os.environ:
        print(f"\n{here.described(config, model, found, values, options.budget)}")


if __name__ == "__main__":
    run(main, add_options)
