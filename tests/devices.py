"""Forked processes that share a step: no seconds of imports for each."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed

from stages.shared.parallel.group import Group


def together(size: int, work: Callable[..., Any], *args: Any) -> Any:
    """Call `work(group, *args)` in each of `size` processes; returns what the first returns."""
    context = multiprocessing.get_context("fork")
    with TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_one, args=(Path(folder), rank, size, work, args), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        for process in processes:
            process.kill()
        result: Any = torch.load(Path(folder, "0"), weights_only=False)
    return result


def _one(folder: Path, rank: int, size: int, work: Callable[..., Any], args: Any) -> None:
    try:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        store = f"file://{folder}/store"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        torch.save(work(Group(rank, size), *args), folder / str(rank))
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
