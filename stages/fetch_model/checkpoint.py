"""A model as transformers saves it: what is taken, what is refused, and its one form here.

Weights keep their bytes. config.json, generation_config.json, the index of shards and the tokenizer
are written anew, without what belongs to the machine that they came from.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from stages.shared.core import files, progress
from stages.shared.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
SMALL_FILES = (CONFIG, GENERATION_CONFIG, INDEX, *TOKENIZER_FILES)

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Where a model was loaded from, code that came with it, and how it was run there.
_DROPPED = re.compile(
    r"_?(model_)?name_or_path|_commit_hash|auto_map|is_local|local_files_only"
    r"|_?(attn|experts)_implementation\w*|_flash_attn_2_enabled|use_flash_attention_2"
    r"|use_cache|cache_implementation|output_(attentions|hidden_states|router_logits|scores|logits)"
    r"|(use_)?return_dict(_in_generate)?|torchscript|use_bfloat16|gradient_checkpointing"
    r"|device_map|use_kernels|kernel_config|compile_config"
)
_PROBE = "Two plus two is 4.\n\n\tДва и два — 四。 <|im_end|></s> def f(x): return</s>x  # 🙂"


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json, safetensors and a tokenizer; a message calls it `name`."""

    folder: Path
    name: str
    config: dict[str, Any]
    weight_map: dict[str, str]  # file of each tensor; empty where there is one file

    @property
    def weights(self) -> list[str]:
        """The names of its safetensors."""
        return sorted(set(self.weight_map.values())) or [WEIGHTS]


def gather(
    names: Collection[str], where: str, bring: Callable[[Sequence[str]], Path]
) -> Checkpoint:
    """Bring what is small and can be refused, then the weights.

    Args:
        names: all files that the model has.
        where: what a message calls the model.
        bring: makes files of these names readable, and returns the folder that they lie in.

    Raises:
        UserError: the model cannot be tuned here, or has no safetensors.
    """
    small = [name for name in SMALL_FILES if name in names]
    folder = bring(small)
    config, weight_map = _read_config(folder, where), _read_weight_map(folder, names, where)
    checkpoint = Checkpoint(folder, where, config, weight_map)
    return replace(checkpoint, folder=bring([*small, *checkpoint.weights]))


def install(checkpoint: Checkpoint, base: Path, tokenizer_folder: Path, *, move: bool) -> None:
    """Put the model into the folder `base`, and its tokenizer into `tokenizer_folder`.

    The weights are moved there, or copied: those of the user's cache stay.
    """
    source, name, weights = checkpoint.folder, checkpoint.name, checkpoint.weights
    index = _index(checkpoint)
    _install_tokenizer(checkpoint, tokenizer_folder)
    files.write_json(base / CONFIG, checkpoint.config)
    if (source / GENERATION_CONFIG).is_file():
        files.write_json(base / GENERATION_CONFIG, _kept(_read(source / GENERATION_CONFIG, name)))
    if weights != [WEIGHTS]:
        files.write_json(base / INDEX, index)
    if not move:
        files.require_space(base, index["metadata"]["total_size"], f"a copy of {name}")
    with progress.bar(total=len(weights), desc="weights", unit="file") as bar:
        for file in weights:
            (shutil.move if move else shutil.copyfile)(source / file, base / file)
            (base / file).chmod(0o644)
            bar.update()


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """The model's config, without what belongs to another machine."""
    from transformers.models.auto.modeling_auto import (  # noqa: PLC0415  (takes seconds)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )

    if not (folder / CONFIG).is_file():
        raise UserError(f"{name}: has no {CONFIG}. Choose a model that transformers saved.")
    config = _read(folder / CONFIG, name)
    if config.get("quantization_config"):
        raise UserError(
            f"{name}/{CONFIG}: the weights are quantized already (quantization_config). Choose the "
            "original ones, which the `quantize` stage quantizes."
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        code = " and wants to run code of its own (auto_map)" if "auto_map" in config else ""
        raise UserError(
            f"{name}/{CONFIG}: model_type is {kind!r:.60}{code}; expected a causal language model "
            "that transformers knows. Code is never fetched and run."
        )
    return _kept(config)


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what is dropped, in its parts as well."""
    return {
        key: _kept(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not _DROPPED.fullmatch(key)
    }


def _read_weight_map(folder: Path, names: Collection[str], where: str) -> dict[str, str]:
    """The file of each tensor by the index, or nothing where one file holds all.

    transformers follows a name like `../outside.safetensors` in an index out of the folder: a file
    that the model does not have beside the index is refused.
    """
    if WEIGHTS in names:
        return {}
    if INDEX not in names:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        found = f", only {pickles[0]}, a pickle, which runs code as it loads" if pickles else ""
        raise UserError(
            f"{where}: has no {WEIGHTS} and no {INDEX}{found}. Choose a revision that has "
            "safetensors, or convert it."
        )
    weight_map = _read(folder / INDEX, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{where}/{INDEX}: has no weight_map. Choose another revision.")
    beside = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    for tensor, file in weight_map.items():
        if file not in beside:
            raise UserError(
                f"{where}/{INDEX}: puts {tensor} into {file!r}, no .safetensors file beside the "
                "index. Complete the model, or choose another."
            )
    return weight_map


def _index(checkpoint: Checkpoint) -> dict[str, Any]:
    """The index of shards, made of the shards themselves: file of each tensor, bytes of all."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    found: dict[str, str] = {}
    size = 0
    for file in checkpoint.weights:
        path, where = checkpoint.folder / file, f"{checkpoint.name}/{file}"
        try:
            with safe_open(path, framework="numpy") as opened:
                tensors = sorted(opened.keys())
        except SafetensorError as error:
            raise UserError(f"{where}: is not whole ({error}). Fetch or copy it again.") from None
        for tensor in tensors:
            if other := found.get(tensor):
                raise UserError(f"{where}: holds {tensor} as {other} does. Choose another model.")
            found[tensor] = file
        with path.open("rb") as opened:
            size += path.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
    for tensor, file in checkpoint.weight_map.items():
        if found.get(tensor) != file:
            raise UserError(
                f"{checkpoint.name}/{INDEX}: puts {tensor} into {file}, which lacks it. Fetch or "
                "copy the model again."
            )
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(found.items()))}


def _install_tokenizer(checkpoint: Checkpoint, target: Path) -> None:
    """Save the tokenizer of a model so that it needs no model beside it; loaded and compared.

    transformers may read its class from the model's config; once saved, it says so itself.
    """
    source, name = checkpoint.folder, checkpoint.name
    present = [file for file in TOKENIZER_FILES if (source / file).is_file()]
    if not present:
        raise UserError(
            f"{name}: has no tokenizer. Put its tokenizer.json and {TOKENIZER_CONFIG} there, or "
            "choose another model."
        )
    with TemporaryDirectory() as folder:  # beside a config that asks for nothing to be installed
        for file in present:
            shutil.copyfile(source / file, Path(folder, file))
        files.write_json(Path(folder, CONFIG), checkpoint.config)
        original = _load_tokenizer(Path(folder), name)
    if original.eos_token_id is None:
        raise UserError(
            f"{name}: its tokenizer has no eos_token, and a reply could not end. Name it in "
            f"{TOKENIZER_CONFIG}, or choose another model."
        )
    original.save_pretrained(target)
    config = target / TOKENIZER_CONFIG
    stated = _kept(_read(config, name))
    if (legacy := getattr(original, "legacy", None)) is not None:
        stated["legacy"] = legacy  # which is not saved, and decides on spaces after control tokens
    files.write_json(config, stated)
    if _fingerprint(_load_tokenizer(target, name)) != _fingerprint(original):
        raise UserError(
            f"{name}: its tokenizer encodes text in another way without the model beside it. "
            "Choose another model."
        )


def _load_tokenizer(folder: Path, name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer  # noqa: PLC0415  (takes seconds)

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises no narrower kind
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}: has no tokenizer that transformers can load by itself ({reason:.100}). "
            f"Check its tokenizer.json and {TOKENIZER_CONFIG}, or choose another model."
        ) from None


def _fingerprint(tokenizer: "PreTrainedTokenizerBase") -> tuple[object, ...]:
    return (
        tokenizer.encode(_PROBE),
        tokenizer.encode(_PROBE, split_special_tokens=True),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        len(tokenizer),
    )


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}/{path.name}: is not JSON ({error}). Fetch it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{name}/{path.name}: is no JSON object. Choose another revision.")
    return value
