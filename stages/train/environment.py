"""Machine and versions of a training, for the report; no result depends on them."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from stages.train.fingerprint import versions


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads.

    With the same of all these, and the same resolved settings, a training repeats byte for byte.
    """
    on_gpu = device.type == "cuda"
    return {
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu(),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda if on_gpu else None,
    }


def _cpu() -> str:
    """The processor's name, as Linux has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
