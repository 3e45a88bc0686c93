"""Checkpoints as transformers saves them: validate, normalize and install.

Weights keep their bytes; config, index and tokenizer lose settings of the machine they come from.
"""

import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from stages.shared.core import display, files
from stages.shared.core.bounds import require_possible_sizes, without_panic_output
from stages.shared.core.errors import UserError, reading

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)
SMALL_FILES = (CONFIG, GENERATION_CONFIG, INDEX, *TOKENIZER_FILES)
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of <name>.jinja

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Config keys about where the model was loaded from, its own code, and how it was run.
_DROPPED = re.compile(
    r"_?(model_)?name_or_path|_commit_hash|auto_map|is_local|local_files_only"
    r"|_?(attn|experts)_implementation\w*|_flash_attn_2_enabled|use_flash_attention_2"
    r"|use_cache|cache_implementation|output_(attentions|hidden_states|scores|logits)"
    r"|(use_)?return_dict(_in_generate)?|torchscript|use_bfloat16|gradient_checkpointing"
    r"|device_map|use_kernels|kernel_config|compile_config|use_mamba_kernels"
    r"|distributed_config|tp_(plan|size)|transformers_weights"
)
_BIDIRECTIONAL = ("bert-generation", "cpmant", "xlnet")  # beside the masked language models
# Ids beyond the embedding: some models have a padding token there, which is never used.
_UNUSED_IDS = 1024
_LARGEST_VOCABULARY = 1 << 22
_PROBE = "Two plus two is 4.\n\n\tДва и два — 四。 <|im_end|></s> def f(x): return</s>x  # 🙂"


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json, safetensors and a tokenizer."""

    folder: Path
    name: str  # for messages
    config: dict[str, Any]
    weights: list[str]  # names of the safetensors files


def gather(
    files_present: Collection[str], name: str, copy: Callable[[Sequence[str]], Path]
) -> Checkpoint:
    """Copy and validate the small files, then the weights; `copy` returns the copies' folder."""
    named = re.compile(rf"{NAMED_TEMPLATES}/[\w-]+\.jinja")
    small = [file for file in SMALL_FILES if file in files_present]
    small += sorted(file for file in files_present if named.fullmatch(file))
    folder = copy(small)
    config, weights = _read_config(folder, name), _read_index(folder, files_present, name)
    return Checkpoint(copy([*small, *weights]), name, config, weights)


def install(checkpoint: Checkpoint, base: Path, tokenizer_folder: Path, *, move: bool) -> None:
    """Write the model to `base` and its tokenizer to `tokenizer_folder`; move or copy weights."""
    source, name, weights = checkpoint.folder, checkpoint.name, checkpoint.weights
    index = _make_index(checkpoint)
    _install_tokenizer(checkpoint, tokenizer_folder)
    config = checkpoint.config
    if (generation := source / GENERATION_CONFIG).is_file():
        settings = _portable(_read(generation, name))
        files.write_json(base / GENERATION_CONFIG, settings)
        ends = list(dict.fromkeys([*_end_ids(config), *_end_ids(settings)]))
        if ends != _end_ids(config):  # often only here: of all tokens that end a reply
            config = config | {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    files.write_json(base / CONFIG, config)
    if weights != [WEIGHTS]:
        files.write_json(base / INDEX, index)
    if not move:
        files.require_space(base, index["metadata"]["total_size"], f"a copy of {name}")
    with display.bar(total=len(weights), desc="weights", unit="file") as bar:
        for file in weights:
            (shutil.move if move else shutil.copyfile)(source / file, base / file)
            bar.update()


def _end_ids(config: dict[str, Any]) -> list[int]:
    ids = config.get("eos_token_id")
    return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name}: has no {CONFIG}. Choose a model that transformers saved.")
    config = _read(folder / CONFIG, name)
    quantization = config.get("quantization_config")
    # gpt-oss exists in MXFP4 alone; `stages.shared.weights` dequantizes it while reading.
    mxfp4 = isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"
    if quantization and not (mxfp4 and config.get("model_type") == "gpt_oss"):
        what = "the weights are quantized already (quantization_config)"
        raise UserError(f"{name}/{CONFIG}: {what}. Choose the original ones: `quantize` does that.")
    model_type = config.get("model_type")
    known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not isinstance(model_type, str) or model_type not in known:
        code = " and wants to run code of its own (auto_map)" if "auto_map" in config else ""
        what = f"model_type is {model_type!r:.60}{code}; expected a causal model of transformers"
        raise UserError(f"{name}/{CONFIG}: {what}. Code is never fetched and run.")
    config = _portable(config)
    with reading(f"{name}/{CONFIG}", "Correct it, or fetch it again."):
        # Else the tokenizer would be blamed, which is loaded beside it.
        parsed = AutoConfig.for_model(**config)
        require_possible_sizes(parsed)
    encoder = model_type in {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *_BIDIRECTIONAL}
    if encoder and not (getattr(parsed, "is_decoder", False) or parsed.is_encoder_decoder):
        what = f"{model_type} is an encoder, which sees the tokens that it would have to predict"
        raise UserError(f"{name}/{CONFIG}: {what}. Choose a decoder, such as a Llama or a GPT.")
    return config


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """Config without `_DROPPED` keys, at any depth."""
    return {
        key: _portable(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not _DROPPED.fullmatch(key)
    }


def _read_index(folder: Path, files_present: Collection[str], name: str) -> list[str]:
    """Names of the weights' files, all beside the index: transformers follows `../a`."""
    if WEIGHTS in files_present:
        return [WEIGHTS]
    if INDEX not in files_present:
        pickles = [file for file in files_present if file.endswith(_PICKLES)]
        only = f", only {pickles[0]}, a pickle, which runs code as it loads" if pickles else ""
        what = f"has no {WEIGHTS} and no {INDEX}{only}"
        raise UserError(f"{name}: {what}. Choose a revision with safetensors, or convert it.")
    weight_map = _read(folder / INDEX, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{name}/{INDEX}: has no weight_map. Choose another revision.")
    shards = [file for file in files_present if file.endswith(".safetensors") and "/" not in file]
    for tensor, file in weight_map.items():
        if file not in shards:
            what = f"puts {tensor} into {file!r}, no .safetensors file beside the index"
            raise UserError(f"{name}/{INDEX}: {what}. Complete the model.")
    return sorted(set(weight_map.values()))


def _make_index(checkpoint: Checkpoint) -> dict[str, Any]:
    """Index of the shards, from their headers."""
    weight_map: dict[str, str] = {}
    size = 0  # bytes of all tensors
    for file in checkpoint.weights:
        path, where = checkpoint.folder / file, f"{checkpoint.name}/{file}"
        with reading(where, "Fetch it again."), safe_open(path, framework="numpy") as shard:
            tensors = sorted(shard.keys())
        for tensor in tensors:
            if other := weight_map.get(tensor):
                raise UserError(f"{where}: holds {tensor} as {other} does. Choose another model.")
            weight_map[tensor] = file
        with path.open("rb") as opened:
            size += path.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}


def _install_tokenizer(checkpoint: Checkpoint, target: Path) -> None:
    """Save the tokenizer so that it loads without the model's config, and check that it does."""
    source, name = checkpoint.folder, checkpoint.name
    present = [file for file in TOKENIZER_FILES if (source / file).is_file()]
    if not present:
        advice = f"Put tokenizer.json and {TOKENIZER_CONFIG} there."
        raise UserError(f"{name}: has no tokenizer. {advice}")
    with TemporaryDirectory() as folder:  # next to the normalized config: it may name the class
        for file in present:
            shutil.copyfile(source / file, Path(folder, file))
        if (named := source / NAMED_TEMPLATES).is_dir():
            shutil.copytree(named, Path(folder, NAMED_TEMPLATES))
        files.write_json(Path(folder, CONFIG), checkpoint.config)
        original = _load_tokenizer(Path(folder), name)
    advice = "Repair it, or choose another."
    with without_panic_output(), reading(f"{name}/{TOKENIZER_CONFIG}", advice):
        if original.eos_token_id is None:
            what = "its tokenizer has no eos_token, and a reply could not end"
            raise UserError(f"{name}: {what}. Name it in {TOKENIZER_CONFIG}.")
        _require_embedded(original, checkpoint)
        expected = _fingerprint(original)
        original.save_pretrained(target)
    config = target / TOKENIZER_CONFIG
    settings = _portable(_read(config, name))
    if (legacy := getattr(original, "legacy", None)) is not None:
        settings["legacy"] = legacy  # not saved; it decides on spaces after special tokens
    files.write_json(config, settings)
    if _fingerprint(_load_tokenizer(target, name)) != expected:
        what = "its tokenizer encodes text differently without the model's config"
        raise UserError(f"{name}: {what}. Choose another model.")


def _require_embedded(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint) -> None:
    """Refuse ids far beyond the embedding: arrays are as long as the largest."""
    text_config = checkpoint.config.get("text_config")
    config = text_config if isinstance(text_config, dict) else checkpoint.config
    size = config.get("vocab_size")
    size = min(size if isinstance(size, int) else _LARGEST_VOCABULARY, _LARGEST_VOCABULARY)
    last = max(tokenizer.get_vocab().values(), default=0)
    if last >= size + _UNUSED_IDS:
        what = f"its tokenizer has the token id {last}, its {CONFIG} a vocabulary of {size}"
        raise UserError(f"{checkpoint.name}: {what}. Fetch the tokenizer of this model.")


def _load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    advice = f"Check tokenizer.json and {TOKENIZER_CONFIG}, or choose another model."
    with without_panic_output(), reading(f"{name}: its tokenizer", advice):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    ids = tokenizer.encode(_PROBE), tokenizer.encode(_PROBE, split_special_tokens=True)
    return ids, tokenizer.special_tokens_map, tokenizer.chat_template, len(tokenizer)


def _read(path: Path, name: str) -> dict[str, Any]:
    return files.read_json(path, f"{name}/{path.name}", "Fetch it again, or choose another.")
