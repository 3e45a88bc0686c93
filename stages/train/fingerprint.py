"""Fingerprint of a training: one name for all that shapes it, by which checkpoints are found.

Another rank, data set, model, code or version never resumes from them.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.shared.core import files
from stages.train.config import Params

# Libraries that compute or draw; another version may round or draw otherwise.
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")
WHERE_INSTALLED = ("liger-kernel",)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a result."""
    found = [name for name in WHERE_INSTALLED if find_spec(name.replace("-", "_"))]
    libraries = {name: metadata.version(name) for name in (*LIBRARIES, *found)}
    return {"python": platform.python_version()} | libraries


def code_sha256() -> str:
    """Hash of the code that dvc.yaml declares for `train`: all that it imports."""
    declared = YAML(typ="safe").load(Path("dvc.yaml"))["stages"]["train"]["deps"]
    code = [Path(name) for name in declared if name.startswith("stages/")]
    sources = {p for path in code for p in (path.rglob("*.py") if path.is_dir() else [path])}
    named = [(path.as_posix(), files.sha256(path)) for path in sorted(sources)]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def identity(settings: Params, device: str, inputs: list[Path]) -> dict[str, Any]:
    """Parts that shape a training, by the names that users know.

    Args:
        settings: the parameters.
        device: `cpu` or `cuda`, whose optimizers keep different states.
        inputs: files and folders that it reads.
    """
    hashes = {str(p): files.folder_sha256(p) if p.is_dir() else files.sha256(p) for p in inputs}
    libraries = {f"version of {name}": version for name, version in versions().items()}
    shape = {"params.yaml": settings.model_dump(), "QLORA_DEVICE": device, "stages": code_sha256()}
    return shape | hashes | libraries


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Name a training by 16 hex digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
