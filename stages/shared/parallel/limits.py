"""Memory that this machine has or allows: never how much of it is free."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from stages.shared.core.machine import machine

GIB = 2**30
PROC, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
RLIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)


def total_memory_bytes(device: str, budget_gib: float | None = None) -> int:
    """The budget (`QLORA_MEMORY_BUDGET`), or all memory of the first device of this kind.

    Of a CPU no more than its cgroup and ulimit allow. `device`: cpu or cuda.
    """
    gib = machine().memory_budget if budget_gib is None else budget_gib
    limits = [] if gib is None else [int(gib * GIB)]
    if device == "cuda":
        if not limits:
            import torch  # noqa: PLC0415  (seconds that a plan for a CPU need not pay)

            limits.append(torch.cuda.get_device_properties(0).total_memory)
        return limits[0]
    if not limits:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    soft = (resource.getrlimit(kind)[0] for kind in RLIMITS)
    limits += [limit for limit in soft if limit != resource.RLIM_INFINITY]
    return min([*limits, *cgroup_limits()])


def cgroup_limits(proc: Path = PROC, mount: Path = MOUNT) -> Iterator[int]:
    """Memory limits of this process's control group and those above it, of version 1 or 2.

    Inside a container the group's own path may be missing: then the mount is the group.
    """
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = mount / "memory" if controllers else mount
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = base / path.strip("/")
        while True:
            try:
                text = (group / name).read_text().strip()
            except OSError:
                text = ""
            if text.isdigit() and int(text) < 2**62:  # version 1 says "none" by a huge number
                yield int(text)
            if group == base or base not in group.parents:
                break
            group = group.parent
