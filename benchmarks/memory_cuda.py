"""Predicted against measured memory of real training steps on a CUDA device.

Reads:  the shipped configs (sizes only); weights are random, and nothing is fetched
Run:    python -m benchmarks.memory_cuda                       (Mistral-7B)
        python -m benchmarks.memory_cuda --model Llama-3-8B --caps 16 24 80

Measured is `torch.cuda.max_memory_allocated`, live tensors rounded to 512 bytes, and
`max_memory_reserved`, which the device must have beside CUDA's context. Both count what products
have as a workspace, and not the pages of the optimizer's states. Then, within each cap
(`set_per_process_memory_fraction`), the longest conversation and the highest rank that a step
survives, beside those that the planner would have said.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from benchmarks import memory
from benchmarks.random_quantized import qlora_model
from benchmarks.training_step import Setting, prepared_step
from stages.plan.named import CONFIGS
from stages.shared import fitting
from stages.shared.architecture import model_of_config
from stages.shared.fitting import GIB
from stages.shared.memory import pageable_bytes
from stages.shared.peak import Prediction
from stages.shared.step.adapter_sizes import adapter_of
from stages.shared.tensors import Model

LENGTHS = (512, 2048)
RANKS = (8, 64)
LONGEST = 2**17  # tokens that the search goes up to
HIGHEST_RANK = 2**12


@dataclass(frozen=True)
class Row:
    """One setting on the device, in bytes."""

    setting: Setting
    predicted: int
    allocated: int
    reserved: int

    @property
    def error(self) -> float:
        """(predicted - allocated) / allocated."""
        return self.predicted / self.allocated - 1


def measure(config_path: Path, setting: Setting, device: torch.device) -> tuple[int, int]:
    """Bytes allocated and reserved at the peak of a step; a fresh model each time.

    Raises:
        torch.cuda.OutOfMemoryError: they are not there.
    """
    gc.collect()
    torch.cuda.empty_cache()
    config = AutoConfig.from_pretrained(config_path)
    model = qlora_model(config, setting.rank or 0, device, double_quant=setting.double_quant)
    if setting.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    _, take = prepared_step(model, setting, device, torch.bfloat16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    take()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def predict(model: Model, setting: Setting) -> Prediction:
    """What the planner says of a setting on CUDA."""
    return memory.predict(model, setting, device="cuda")


def allocated_by_torch(model: Model, setting: Setting) -> int:
    """Bytes of it that torch's allocator hands out: no pages, but the workspace of products."""
    adapter = adapter_of(model.tensors, rank=setting.rank or 1)
    pages = pageable_bytes(setting.optimizer, adapter.sizes)
    return predict(model, setting).total_bytes - pages + fitting.PRODUCTS_WORKSPACE_BYTES


def would_fit(model: Model, setting: Setting, cap_bytes: int) -> bool:
    """Whether the planner would let it through."""
    adapter = adapter_of(model.tensors, rank=setting.rank or 1)
    tuning = memory.tuning_of(setting, adapter, "cuda")
    return fitting.fits(model, tuning, predict(model, setting), cap_bytes)


def largest(survives: Callable[[int], bool], limit: int, step: int = 1) -> int:
    """The largest multiple of `step`, up to `limit`, that survives; 0 if none does.

    What survives must do so at all smaller values: doubled until it fails, then halved in between.
    """
    good, bad = 0, limit // step + 1
    value = 1
    while value < bad:
        if not survives(value * step):
            bad = value
            break
        good, value = value, 2 * value
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if survives(middle * step) else (good, middle)
    return good * step


def settings() -> list[Setting]:
    """NF4 with double quantization, one conversation, all of it learnt but the first token."""
    return [
        Setting("nf4", rank, checkpointed, (length,), supervised=1.0)
        for length in LENGTHS
        for rank in RANKS
        for checkpointed in (True, False)
    ]


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = [
        "| tokens | rank | checkpointed | predicted, GiB | allocated | error | reserved |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        setting = row.setting
        lines.append(
            f"| {setting.tokens} | {setting.rank} | "
            f"{'yes' if setting.gradient_checkpointing else 'no'} | "
            f"{row.predicted / GIB:.2f} | {row.allocated / GIB:.2f} | "
            f"{row.error:+.1%} | {row.reserved / GIB:.2f} |"
        )
    return "\n".join(lines)


def context_bytes(device: torch.device) -> int:
    """What is taken on the device beside torch's memory: CUDA's context, and other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def limits(config_path: Path, model: Model, gib: int, device: torch.device) -> str:
    """The longest conversation and the highest rank within a cap, survived and predicted."""
    total = torch.cuda.get_device_properties(device).total_memory
    if gib * GIB > total:
        return f"{gib} GiB: this device has {total / GIB:.1f}"
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total, device)
    base = Setting("nf4", 16, True, (2048,), supervised=1.0)

    def survives(setting: Setting) -> bool:
        try:
            measure(config_path, setting, device)
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    def search(accepts: Callable[[Setting], bool]) -> tuple[int, int]:
        return (
            largest(lambda n: accepts(replace(base, lengths=(n,))), LONGEST, step=256),
            largest(lambda r: accepts(replace(base, rank=r)), HIGHEST_RANK, step=8),
        )

    survived = search(survives)
    said = search(lambda setting: would_fit(model, setting, gib * GIB))
    return (
        f"{gib} GiB: longest conversation {survived[0]:,} tokens (planned {said[0]:,}), "
        f"highest rank at 2,048 tokens {survived[1]:,} (planned {said[1]:,})"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_cuda")
    known = sorted(path.stem for path in CONFIGS.glob("*.json"))
    parser.add_argument("--model", choices=known, default="Mistral-7B")
    parser.add_argument("--caps", type=int, nargs="*", default=[16, 24, 80], help="GiB")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this machine has no CUDA device that torch can use")
    device = torch.device("cuda", 0)
    config_path = CONFIGS / f"{options.model}.json"
    model = model_of_config(config_path)
    rows = []
    for setting in settings():
        allocated, reserved = measure(config_path, setting, device)
        rows.append(Row(setting, allocated_by_torch(model, setting), allocated, reserved))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{options.model} on {torch.cuda.get_device_name(device)}\n\n{table(rows)}\n")
    print(f"beside torch's memory: {context_bytes(device) / GIB:.2f} GiB (CUDA's context)")
    for gib in options.caps:
        print(limits(config_path, model, gib, device), flush=True)


if __name__ == "__main__":
    main()
