"""Memory that a training's process holds, in short trainings of different kinds on this CPU.

Called by `python -m benchmarks.memory processes`. Memory does not depend on the load: as many run
at once as there are cores, a thread each.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import torch

from benchmarks.common import BASE, MEMORY_PAGE, ROOT, machine, publish, workspace
from stages.quantize.__main__ import Quantize
from stages.quantize.convert import convert
from stages.shared.core import files

STEPS = 24  # lengths differ from step to step, and so the heap grows for some

PROCESSES: dict[str, dict[str, Any]] = {
    "default": {},
    "checkpointed": {"QLORA_GRADIENT_CHECKPOINTING": "true"},
    "rank 128": {"lora.r": 128},
    "not fused": {"QLORA_FUSED": "false"},
    "micro-batches of 128": {"QLORA_MICRO_BATCH_TOKENS": "128"},
    "int8": {"quantize.precision": "int8"},
    "fp32": {"quantize.precision": "fp32"},
    "full, 8-bit AdamW": {
        "quantize.precision": "bf16",
        "train.method": "full",
        "train.optimizer": "adamw_8bit",
    },
}


def measure() -> None:
    """Train in each way; publish the predicted and the measured peak."""
    default = {"precision": "nf4", "double_quant": True, "compute_dtype": "bf16"}
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(os.cpu_count()) as pool:
        for kind in {changes.get("quantize.precision", "nf4") for changes in PROCESSES.values()}:
            (folder := Path(work, kind)).mkdir()
            settings = Quantize.model_validate(default | {"precision": kind})
            convert(BASE, folder, settings, torch.device("cpu"))
        rows = list(pool.map(partial(row_of, Path(work)), PROCESSES))
    columns = ["training", "micro-batch", "predicted, GB", "held, GB", "error"]
    publish("processes", pd.DataFrame(rows, columns=columns), machine(), MEMORY_PAGE)


def row_of(models: Path, name: str) -> tuple[str, ...]:
    """Train on the first conversations of the default's data; a row of the table."""
    changes = PROCESSES[name]
    environment = {key: value for key, value in changes.items() if key.startswith("QLORA_")}
    params = {key: value for key, value in changes.items() if not key.startswith("QLORA_")}
    with workspace(params | {"train.max_steps": STEPS, "train.eval_steps": STEPS}) as space:
        for path in (".counts", "models/base", "models/tokenizer", "data/prepared/format.json"):
            space.link(path, ROOT / path)
        space.link("models/quantized", models / params.get("quantize.precision", "nf4"))
        files.write_json(space.root / "models/source.json", {"source": "path"})
        for split, count in (("train", 8 * STEPS), ("eval", 40)):
            path = f"data/prepared/{split}.parquet"
            pq.write_table(pq.read_table(ROOT / path).slice(0, count), space.root / path)
        space.run("stages.train", env={"OMP_NUM_THREADS": "1", **environment})
        metrics = space.read_json("reports/train.json")
    predicted, held = metrics["predicted_memory_bytes"], metrics["peak_memory_bytes"]
    sizes = f"{predicted / 1e9:.2f}", f"{held / 1e9:.2f}", f"{predicted / held - 1:+.1%}"
    print(row := (name, str(metrics["micro_batch_tokens"]), *sizes), flush=True)
    return row
