"""Seeded faults in stages, and whether each ends as it should: `python -m tests.faults.injector`.

Each ends in one line and a code, or with the outs of the undamaged run, or with others after a
warning; never in a traceback, without a word or without end.
"""

import argparse
import importlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults.kinds import FAULTS, Try
from tests.faults.pipeline import STAGES, Ended, Pipeline, hashes, make_pipeline, run

ENDINGS = ("error: ", "stopped: ")
IMPORTED = (
    *("datasets", "dvc.repo", "matplotlib.figure", "multiprocess.pool", "pandas"),
    *("stages.shared.model.loading", "stages.evaluate.evaluate", "stages.merge.merge"),
    *("gguf.gguf_writer", "stages.export.export"),
    *("stages.plan.this_machine", "stages.prepare.dataset", "stages.quantize.convert"),
    *("stages.quantize.quantization_error", "stages.report.page", "stages.train.recipe"),
    *("stages.fetch_model.sources", "stages.fetch_data.sources", "transformers.models.llama"),
    *("transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"),
)


def judge(pipeline: Pipeline, root: Path, attempt: Try) -> tuple[str, Ended]:
    """Run a try; "right", or how it went wrong."""
    ended = run(root, attempt.stage, attempt.before, **attempt.how)
    expected = pipeline.outs[attempt.stage]
    verdict = _verdict(ended, attempt, hashes(root, attempt.stage) == expected)
    partial = [path for path in root.rglob("*.partial") if ".git" not in path.parts]
    if verdict == "right" and partial and (ended.code or 0) > 0 and " at " not in attempt.fault:
        verdict = "half written"
    if verdict == "right" and ended.code and attempt.resumes:
        ended = run(root, attempt.stage)
        if ended.code or hashes(root, attempt.stage) != expected:
            verdict = "half written"
    return verdict, ended


def _verdict(ended: Ended, attempt: Try, same: bool) -> str:
    """By the way that a stage ended, and whether its outs are the undamaged ones."""
    if ended.code is None:
        return "unbounded"
    if any(words in ended.said for words in ("Traceback (most", "Exception ignored")):
        return "traceback"
    *_, last = ["", *ended.said.splitlines()]
    if ended.code == 0:
        told = "warning: " in ended.said and "dvc.lock" in ended.said
        right = same or attempt.may_differ or told
    else:
        unheard = "nobody reads" in attempt.fault or ended.code == -signal.SIGKILL
        right = last.startswith(ENDINGS) or unheard
    return "right" if right else "silent"


def sweep(tries: int, seed: int, only: str = "") -> tuple[Counter[str], list[str]]:
    """Judge as many tries; counts of outcomes, and a line with the details of each wrong one."""
    for name in IMPORTED:
        importlib.import_module(name)
    counts, wrong = Counter[str](), list[str]()
    with TemporaryDirectory() as scratch:
        pipeline = make_pipeline(Path(scratch, "pipeline"))
        for index in range(tries):
            draw = random.Random(f"{seed} {index}")
            fault = draw.choices([f for f, _ in FAULTS], [weight for _, weight in FAULTS])[0]
            stage = STAGES[index % len(STAGES)]
            if only and str(index) not in only.split(","):
                continue
            root = Path(scratch, f"try-{index}")
            subprocess.run(["cp", "-al", pipeline.root, root], check=True)
            attempt = fault(pipeline, root, stage, draw)
            verdict, ended = judge(pipeline, root, attempt)
            counts[verdict] += 1
            told = (ended.said.splitlines() or [""])[-1]
            line = (
                f"{index} {attempt.stage}: {attempt.fault} → {verdict}, {ended.code}: {told:.300}"
            )
            print(line, flush=True)
            if verdict != "right":
                wrong.append(f"{line}\n{ended.said[-3000:]}" if only else line)
            subprocess.run(["rm", "-rf", root], check=True)
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="indices of tries, as 3,17: these in detail")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    counts, wrong = sweep(options.tries, options.seed, options.only)
    print(*wrong, sep="\n")
    print(json.dumps({"tries": counts.total(), **counts}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
