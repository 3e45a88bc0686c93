"""How much memory this machine has, or may be used: never how much of it is free."""

import os

from stages.shared.core.machine import machine
from stages.shared.fitting import GIB
from stages.shared.tuning import Device


def total_memory_bytes(device: Device, budget_gib: float | None = None) -> int:
    """The budget, `QLORA_MEMORY_BUDGET`, or all memory of the first device of this kind."""
    gib = machine().memory_budget if budget_gib is None else budget_gib
    if gib is not None:
        return int(gib * GIB)
    if device == "cuda":
        import torch  # noqa: PLC0415  (seconds that a plan for a CPU need not pay)

        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
