"""A model as transformers saves it: what is taken of it, what is refused, where it goes."""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.fetch_model import tokenizer
from stages.shared.core import files, progress
from stages.shared.core.errors import UserError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SMALL_FILES = (CONFIG, GENERATION_CONFIG, INDEX, *tokenizer.FILES)

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What a config says of the place it was loaded from, and of code that came with it.
_NOT_KEPT = ("_name_or_path", "_model_name_or_path", "auto_map")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json, safetensors and a tokenizer.

    Attributes:
        folder: where it lies.
        name: what a message calls it.
        ours: whether its files may be moved away; the user's own are copied.
    """

    folder: Path
    name: str
    ours: bool


def install(checkpoint: Checkpoint, base: Path, tokenizer_folder: Path) -> None:
    """Put the model into `base` and the tokenizer into `tokenizer_folder`, both existing folders.

    Weights keep their bytes. The user's own files are copied and never linked: DVC makes what it
    tracks read-only, and a link would be the user's file.

    Raises:
        UserError: as `read_config`, `weight_files` and `tokenizer.install` do; a file of weights
            is damaged.
    """
    source, name = checkpoint.folder, checkpoint.name
    config = read_config(source, name)
    weights = weight_files(source, {path.name for path in source.iterdir()}, name)
    for file in weights:
        _require_readable(source / file, f"{name}/{file}")
    tokenizer.install(source, tokenizer_folder, name)
    files.write_json(base / CONFIG, config)
    others = [GENERATION_CONFIG] if (source / GENERATION_CONFIG).is_file() else []
    others += [] if weights == [WEIGHTS] else [INDEX]
    if not checkpoint.ours:
        needed = sum((source / file).stat().st_size for file in weights)
        files.require_space(base, needed, f"a copy of {name}")
    with progress.bar(total=len(weights), desc="weights", unit="file") as bar:
        for file in [*others, *weights]:
            (shutil.move if checkpoint.ours else shutil.copyfile)(source / file, base / file)
            (base / file).chmod(0o644)
            bar.update(file in weights)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The model's config, without what is not kept of it.

    Raises:
        UserError: it is not there, or describes a model that cannot be tuned here.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{name}: has no {CONFIG}; expected a causal language model as transformers saves it; "
            "choose another"
        )
    config = _read_object(folder / CONFIG, name)
    if config.get("quantization_config"):
        raise UserError(
            f"{name}/{CONFIG}: the weights are quantized already (quantization_config); expected "
            "those that they were made from, since the `quantize` stage quantizes; choose them"
        )
    if config.get("model_type") not in _known_model_types():
        code = " and wants to run code of its own (auto_map)" if "auto_map" in config else ""
        raise UserError(
            f"{name}/{CONFIG}: model_type is {config.get('model_type')!r}{code}; expected a causal "
            "language model that transformers knows by itself, since code is never fetched and run"
        )
    return {key: value for key, value in config.items() if key not in _NOT_KEPT}


def weight_files(folder: Path, names: Collection[str], where: str) -> list[str]:
    """The safetensors that transformers would load, in order of name.

    transformers follows a name like `../outside.safetensors` in an index out of the folder; here
    a name is a file beside the index, or it is refused.

    Args:
        folder: holds the index, if the model has one.
        names: all files that the model has.
        where: what a message calls the model.

    Raises:
        UserError: there are none, or the index names a file that is not beside it.
    """
    if WEIGHTS in names:
        return [WEIGHTS]
    if INDEX not in names:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        found = f"only {pickles[0]}, a pickle, which runs code as it loads" if pickles else "none"
        raise UserError(
            f"{where}: has no {WEIGHTS} and no {INDEX}, but {found}; expected safetensors; "
            "choose a revision that has them, or convert it"
        )
    weight_map = _read_object(folder / INDEX, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{where}/{INDEX}: has no weight_map; choose another revision")
    for tensor, file in weight_map.items():
        beside = isinstance(file, str) and "/" not in file and "\\" not in file
        if not beside or not file.endswith(".safetensors"):
            raise UserError(
                f"{where}/{INDEX}: puts {tensor} into {file!r}; expected a .safetensors file "
                "beside the index; do not use this model"
            )
        if file not in names:
            raise UserError(
                f"{where}/{INDEX}: puts {tensor} into {file}, which is not there; "
                "expected all files of the index; the model is incomplete, fetch or copy it again"
            )
    return sorted(set(weight_map.values()))


def _known_model_types() -> Collection[str]:
    from transformers.models.auto.modeling_auto import (  # noqa: PLC0415  (takes seconds)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _read_object(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}/{path.name}: is not JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{name}/{path.name}: is no JSON object; choose another revision")
    return value


def _require_readable(path: Path, name: str) -> None:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise UserError(
            f"{name}: is not whole ({error}); expected safetensors; fetch or copy it again"
        ) from None
