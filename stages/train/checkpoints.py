"""Checkpoints: written whole or not at all, and read only if their hashes are right.

    .checkpoints/<fingerprint>.lock        held by the one training that may write there
    .checkpoints/<fingerprint>/loss.csv    the curve so far, written after every step
    .checkpoints/<fingerprint>/best/       the best weights so far, as models/adapter
    .checkpoints/<fingerprint>/step-000025/state.pt        schedule, history
    .checkpoints/<fingerprint>/step-000025/tensors-0000.pt weights, optimizer states by name
    .checkpoints/<fingerprint>/step-000025/best/           hard links to the best of that time
    .checkpoints/<fingerprint>/step-000025/manifest.json   SHA-256 of each file, written last

It lies outside DVC's outs, which DVC deletes before it runs a stage. The fingerprint names all that
shapes a training: another rank, data set, model, code or version never resumes from it.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from torch import nn
from torch.optim import Optimizer

from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.parallel.shards import OF_ALL, Shards
from stages.shared.step import optim
from stages.train.config import Params

FOLDER = ".checkpoints"
STATE, BEST, MANIFEST, LOCK = "state.pt", "best", "manifest.json", ".lock"
# Libraries that compute or draw; another version may round or draw otherwise.
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "numpy", "liger-kernel")
Tensors = dict[str, dict[str, Any]]  # of some parameters, by name: `weight`, and optimizer states


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a result, where they are installed."""
    installed = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def code_sha256() -> str:
    """Hash of the code that dvc.yaml declares for `train`: all that it imports."""
    declared = YAML(typ="safe").load(Path("dvc.yaml"))["stages"]["train"]["deps"]
    folders = (Path(name) for name in declared if name.startswith("stages/"))
    sources = sorted(path for folder in folders for path in folder.rglob("*.py"))
    named = [(path.as_posix(), files.sha256(path)) for path in sources]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def identity(settings: Params, device: str, inputs: list[Path]) -> dict[str, Any]:
    """All that shapes a training, by the names that users know; `device` is `cpu` or `cuda`."""
    hashes = {str(p): files.folder_sha256(p) if p.is_dir() else files.sha256(p) for p in inputs}
    libraries = {f"version of {name}": version for name, version in versions().items()}
    shape = {"params.yaml": settings.model_dump(), "QLORA_DEVICE": device, "stages": code_sha256()}
    return shape | hashes | libraries


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Name of a training, 16 hex digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def claim(root: Path, fingerprint: str, keep: int) -> Iterator["Checkpoints"]:
    """The checkpoints of one training, `keep` of them; UserError while another process has them."""
    folder = root / FOLDER / fingerprint
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the worker that writes holds it too
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is training with the same parameters, data and code. "
                "Wait for it, or stop it and run `dvc repro` again."
            ) from None
        try:
            yield Checkpoints(folder, keep)
        finally:
            if not folder.exists():
                Path(lock.name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """`step`, `plan` and the SHA-256 of `files`."""
        return files.read_json(self.folder / MANIFEST)

    def state(self) -> dict[str, Any]:
        """The recipe's state, without tensors."""
        return torch.load(self.folder / STATE, weights_only=True)

    def tensors(self) -> Iterator[Tensors]:
        """Tensors of a parameter at a time, on the CPU, read when used."""
        for path in sorted(self.folder.glob("tensors-*")):
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            yield from ({name: values} for name, values in tensors.items())


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def hold(self) -> None:
        """Share the lock of the process that claimed them, until this one ends."""
        self._lock = self.folder.with_suffix(LOCK).open("rb")
        fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)

    @property
    def best(self) -> Path:
        """The best weights so far; replaced whole, never written into."""
        return self.folder / BEST

    def require_space(self, trainable: int, state_bytes: float) -> None:
        """Refuse too full a disk; `state_bytes` of the optimizer for each trainable parameter."""
        one, best = int(trainable * (4 + state_bytes)), 4 * trainable
        files.require_space(
            self.folder,
            (self.keep + 1) * one + 2 * best,
            f"the resume state ({self.keep} checkpoints of {one / 1e9:.2f} GB, the best weights, "
            "and one more of each while it is written; QLORA_KEEP_CHECKPOINTS sets how many)",
        )

    def write(
        self,
        step: int,
        state: dict[str, Any],
        plan: dict[str, Any],
        tensors: Iterable[Tensors] = (),
    ) -> None:
        """Write a checkpoint after `step` steps, then remove the oldest.

        `plan` is read before any weight; `tensors` are a file each, one in memory at a time.
        """
        with files.whole_folder(self.folder / f"step-{step:06d}") as partial:
            numbered = ((f"tensors-{number:04d}.pt", some) for number, some in enumerate(tensors))
            for name, values in chain([(STATE, state)], numbered):
                with (partial / name).open("wb") as file:  # a path's own faults have no errno
                    torch.save(values, file)
            files.link_folder(self.best, partial / BEST)
            manifest = {"step": step, "plan": plan, "files": _hashes(partial)}
            files.write_json(partial / MANIFEST, manifest)
            for path in partial.rglob("*"):
                _flush(path)
        _flush(self.folder)
        for old in self._written()[: -self.keep]:
            shutil.rmtree(old)

    def newest_bytes(self) -> int:
        """Size of the newest checkpoint; 0 if there is none."""
        return sum(map(files.folder_bytes, self._written()[-1:]))

    def latest(self) -> Checkpoint | None:
        """The newest whole one, its `best` restored, or None; damaged ones are removed."""
        for folder in reversed(self._written()):
            fault = _fault(folder)
            if fault is None:
                with files.whole_folder(self.best) as partial:
                    files.link_folder(folder / BEST, partial)
                return Checkpoint(folder)
            print(f"warning: {folder}: {fault}; skipped", file=sys.stderr)
            shutil.rmtree(folder)
        self.clear()
        return None

    def clear(self) -> None:
        """Remove everything, once the training has succeeded."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _written(self) -> list[Path]:
        """Checkpoints by step, without unfinished ones."""
        written = (p for p in self.folder.glob("step-*") if p.suffix != ".partial")
        return sorted(written, key=lambda p: (len(p.name), p.name))  # six digits, or more


def tensors_of(model: nn.Module, optimizer: Optimizer, shards: Shards | None) -> Iterator[Tensors]:
    """Trained weights and optimizer states; of sharded matrices gathered, a block's at a time."""
    names = {p: name for name, p in model.named_parameters()}
    trained = chain(*(group["params"] for group in optimizer.param_groups))
    states = optimizer.state
    yield {names[p]: {"weight": p.detach(), **states.get(p, {})} for p in trained if p in names}
    for some in shards.gather(lambda part: states.get(part, {})) if shards else ():
        yield {names[p]: values for p, values in some.items()}


def load_tensors(
    model: nn.Module,
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    shards: Shards | None,
    tensors: Iterable[Tensors],
) -> None:
    """Restore weights and optimizer states, `groups` its options; of sharded ones, this part."""
    named = dict(model.named_parameters())
    restored: dict[nn.Parameter, dict[str, Any]] = {}
    for name, values in chain.from_iterable(some.items() for some in tensors):
        if shards and named[name] in shards.matrices:
            shards.keep(named[name], values, restored)
        else:
            restored[named[name]] = values
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for p in trained:
        for key, value in restored[p].items():
            if key not in OF_ALL and value.numel() == p.numel():
                restored[p][key] = value.view(p.shape)
        p.data.copy_(restored[p].pop("weight"))
    own = optimizer.state_dict()["param_groups"]
    groups = [saved | {"params": new["params"]} for saved, new in zip(groups, own, strict=True)]
    state = dict(enumerate(restored[p] for p in trained))
    optim.restore(optimizer, {"state": state, "param_groups": groups})


def _fault(folder: Path) -> str | None:
    """The first fault of a checkpoint, if any."""
    try:
        expected = dict(Checkpoint(folder).manifest["files"])
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    hashes = _hashes(folder)
    for name in sorted(expected.keys() | hashes.keys()):
        if name not in hashes:
            return f"{name} is missing"
        if hashes[name] != expected.get(name):
            return f"{name} is not what was written"
    return None


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of all files but the manifest, by name."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): files.sha256(p) for p in sorted(paths)}


def _flush(path: Path) -> None:
    """Flush to the disk, before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot flush a folder
        os.fsync(descriptor)
    os.close(descriptor)
