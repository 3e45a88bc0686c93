"""Placement of a model: memory that a device has, device count, and whether weights are divided.

Stages that read a model and train nothing compute on one device where the model fits it, and
otherwise on all devices that a training would take, with a part of the weights on each.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.core.machine import machine
from stages.shared.parallel.group import Group, Member, is_started, local_size

GIB = 2**30
# Memory of a model that computes, in sizes of its files: activations, logits and the cache of keys
# and values are assumed to be a quarter.
SIZES = 1.25
HASHED_BYTES = 2**28  # of a larger file the size is compared
PROC, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
RLIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)


def total_memory_bytes(device: str, budget_gib: float | None = None) -> int:
    """The budget (`QLORA_MEMORY_BUDGET`), or all memory of the first device of this kind.

    Never how much of it is free. Of a CPU no more than its cgroup and ulimit allow. `device`: cpu
    or cuda.
    """
    gib = machine().memory_budget if budget_gib is None else budget_gib
    if gib is not None:
        total = int(gib * GIB)
    elif device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device == "cuda":
        return total
    soft = (resource.getrlimit(kind)[0] for kind in RLIMITS)
    limits = (limit for limit in soft if limit != resource.RLIM_INFINITY)
    return min([total, *limits, *cgroup_limits()])


def cgroup_limits(proc: Path = PROC, mount: Path = MOUNT) -> Iterator[int]:
    """Memory limits of this process's control group and those above it, of version 1 or 2.

    Inside a container the group's own path may be missing: then the mount is the group.
    """
    for line in proc.read_text().splitlines() if proc.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = mount / "memory" if controllers else mount
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            with suppress(OSError):
                text = (folder / name).read_text().strip()
                if text.isdigit() and int(text) < 2**62:  # version 1 says "none" by a huge number
                    yield int(text)
            if folder == base:
                break


def device_count(target: torch.device, requested: int | None) -> int:
    """Process count of this host: torchrun's or Slurm's, else requested, else one per GPU."""
    if is_started():
        return local_size()
    if target.type == "cpu":
        return requested or 1
    present = torch.cuda.device_count()
    devices = machine().devices
    if devices and devices > present:
        raise UserError(
            f"QLORA_DEVICES: {devices} requested, and this machine has {present} CUDA devices. "
            "Lower it, or unset it to use all."
        )
    return min(requested or present, present)


def shards_for(folder: Path, target: torch.device, member: Member | None = None) -> int:
    """Devices that a model's weights are divided among: 1 where each that computes holds all.

    Raises:
        UserError: no device holds its part.
    """
    requested, size = machine(), sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    own = target.type == "cpu" and not member  # processes of a CPU share its memory
    whole = requested.shard == "false"
    if member:
        devices = member[0].size
    elif whole:
        devices = 1
    else:
        devices = device_count(target, requested.devices) * requested.nodes
    memory = total_memory_bytes(target.type)
    fits = SIZES * size <= memory or own
    divided = requested.shard == "true" or (requested.shard == "auto" and not fits)
    parts = devices if divided else 1
    if target.type == "cuda" and size / parts > memory:
        advice = "Unset QLORA_SHARD" if whole else "Take more devices"
        raise UserError(
            f"{folder}: needs {size / parts / GIB:.1f} GiB on each of {devices} devices; there are "
            f"{memory / GIB:.1f}. {advice}, or set QLORA_DEVICE=cpu for this stage."
        )
    return parts


def require_same(group: Group, *paths: Path) -> None:
    """Refuse a process whose files are not the first one's: those of another host may differ."""
    identity = {}
    for path in paths if group.size > 1 else ():
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        sizes = {file: file.stat().st_size for file in below if file.is_file()}
        identity[str(path)] = [
            (file.name, files.sha256(file) if size <= HASHED_BYTES else size)
            for file, size in sizes.items()
        ]
    group.require_same(identity)
