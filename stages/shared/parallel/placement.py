"""Placement of a model: on how many devices, and whether each holds all of its weights or a part.

Stages that read a model and train nothing compute on one device where the model fits it, and
otherwise on all devices that a training would take, with a part of the weights on each.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.core.machine import machine
from stages.shared.parallel import launcher
from stages.shared.parallel.group import Group
from stages.shared.parallel.limits import GIB, total_memory_bytes

# Memory of a model that computes, in sizes of its files: activations, logits and the cache of keys
# and values are assumed to be a quarter.
SIZES = 1.25
HASHED_BYTES = 2**28  # of a larger file the size is compared
Member = tuple[Group, torch.device]


def device_count(target: torch.device, requested: int | None) -> int:
    """Process count of a host: requested, else one per GPU."""
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
    whole = requested.shard == "false"
    if not member and (whole or (requested.shard == "auto" and target.type == "cpu")):
        return 1
    if member:
        devices = member[0].size
    else:
        devices = device_count(target, requested.devices) * requested.nodes
    room = total_memory_bytes(target.type)
    parts = 1 if requested.shard == "auto" and SIZES * size <= room else devices
    parts = 1 if whole else parts
    if target.type == "cuda" and size / parts > room:
        raise UserError(
            f"{folder}: needs {size / parts / GIB:.1f} GiB on each of {devices} devices; there are "
            f"{room / GIB:.1f}. Take more devices, or set QLORA_DEVICE=cpu for this stage."
        )
    return parts


def compute(
    member: Member | None, target: torch.device, shards: int, work: Callable[..., Any], *args: Any
) -> Any:
    """Call `work(group, device, sharded, *args)`; returns what the first process returns.

    `member` as of `member.joined`, `shards` of `shards_for`; `work` is a function at the top level
    of a module, and makes the same passes in all processes.
    """
    if member:
        return work(*member, shards > 1, *args)
    return launcher.launch(shards, target, work, shards > 1, *args)


def require_same(group: Group, *paths: Path) -> None:
    """Refuse a process whose files are not the first one's: those of another host may differ."""
    identity = {}
    for path in paths if group.size > 1 else ():
        some = sorted(path.rglob("*")) if path.is_dir() else [path]
        sizes = {file: file.stat().st_size for file in some if file.is_file()}
        identity[str(path)] = [
            (file.name, files.sha256(file) if size <= HASHED_BYTES else size)
            for file, size in sizes.items()
        ]
    group.require_same(identity)
