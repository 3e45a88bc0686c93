"""One standalone model from an adapter and the weights it was trained on."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.shared.model import loading  # before peft

# isort: split
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.merge import verify
from stages.merge.config import Merge
from stages.shared.chat.templates import Format, read_format
from stages.shared.chat.tokenizer import add_no_special_tokens, load_tokenizer
from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.core.machine import device
from stages.shared.model.packing import read_examples
from stages.shared.weights.precision import DTYPES


def merge(
    settings: Merge,
    adapter: Path,
    weights: Mapping[str, Path],
    tokenizer: Path,
    data: Path,
    folder: Path,
) -> dict[str, Any]:
    """Write a standalone model into `folder`, verify that it is the trained one, and report.

    Args:
        settings: the parameters.
        adapter: a PEFT adapter, or a standalone model after a full fine-tune.
        weights: the folders of the `quantized` and the `original` weights.
        tokenizer: the tokenizer's folder.
        data: holds eval.parquet and format.json.
        folder: an existing folder.
    """
    trained_on, trained_by = weights["quantized"], device()
    refuse_original(adapter, settings.onto)
    if loading.is_adapter(adapter):
        onto = weights[settings.onto]
        merge_adapter(adapter, onto, folder, DTYPES[settings.dtype], trained_by)
    else:
        files.link_folder(adapter, folder)  # standalone already
    make_standalone(folder, trained_on, tokenizer, read_format(data / "format.json"))
    examples = verify.first_positions(read_examples(data / "eval.parquet"))
    required = settings.onto == "quantized"
    measured = verify.verify(folder, adapter, trained_on, examples, trained_by, required=required)
    return {"onto": settings.onto, **measured, "bytes": files.folder_bytes(folder)}


def merge_adapter(
    adapter: Path, onto: Path, folder: Path, dtype: torch.dtype, trained_by: torch.device
) -> None:
    """Add the adapter to the dequantized weights in fp32 on a CPU, round once, and save.

    Not `merge_and_unload()` on quantized layers: that quantizes the sum again, and the merged
    model then agrees with the trained one in only 74 % of its most likely tokens.
    """
    tuned = loading.attach(loading.load_dequantized(onto, trained_by), adapter)
    untie_adapted_ends(tuned)
    with warnings.catch_warnings():
        # That embedding and head are tied no more is meant, where only one of them was trained.
        warnings.filterwarnings("ignore", ".*tie")
        merged = tuned.merge_and_unload().to(dtype)
    transpose_as_stored(merged)
    for name, weight in merged.named_parameters():
        if not all(extreme.isfinite() for extreme in weight.aminmax()):
            raise UserError(
                f"params.yaml: merge.dtype is fp16, which ends at 65504, but {name} holds larger "
                "weights. Set merge.dtype to bf16 or fp32."
            )
    merged.save_pretrained(folder)


def transpose_as_stored(model: PreTrainedModel) -> None:
    """GPT-2 stores its matrices [in, out], of which quantizing made linear layers, [out, in]."""
    with torch.device("meta"):
        stored = type(model)(model.config)
    for name, layer in stored.named_modules():
        loaded = model.get_submodule(name)
        if isinstance(layer, Conv1D) and isinstance(loaded, nn.Linear):
            transposed = Conv1D(layer.nf, layer.nx)
            transposed.weight = nn.Parameter(loaded.weight.t().contiguous())
            transposed.bias = loaded.bias
            model.set_submodule(name, transposed)


def untie_adapted_ends(tuned: PeftModel) -> None:
    """Give embedding and head a matrix each, where they share one that an adapter changes.

    The adapter was trained on one end alone (or one on each): merged into the shared matrix it
    would change both. A full copy (`modules_to_save`) is a matrix of its own already; where both
    ends were trained in full they are one copy, and stay tied.
    """
    ends = (tuned.get_input_embeddings(), tuned.get_output_embeddings())
    adapted = [end for end in ends if isinstance(end, LoraLayer)]
    if adapted and ends[0].weight is ends[1].weight:
        layer = adapted[0].get_base_layer()
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def refuse_original(tuned: Path, onto: str) -> None:
    """Refuse the original weights for an adapter that fits no others than those it was trained on.

    A full fine-tune changed every weight: there is no adapter. An adapter that began as LoftQ holds
    the quantization error, which the original weights do not have.
    """
    if onto != "original":
        return
    reason = None
    if not loading.is_adapter(tuned):
        reason = "train.method full leaves a whole model and no adapter"
    elif files.read_json(tuned / "adapter_config.json").get("loftq_config"):
        reason = "lora.init loftq makes up for an error of quantization that these do not have"
    if reason:
        raise UserError(
            f"params.yaml: merge.onto is 'original', but {reason}. Set merge.onto to quantized."
        )


def make_standalone(folder: Path, trained_on: Path, tokenizer_folder: Path, form: Format) -> None:
    """Add the tokenizer, with the chat template and end token of training, and the stop tokens.

    The config's dtype is the file's, so that a default load computes with the verified numbers.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = form.chat_template
    tokenizer.eos_token = form.eos_token
    silenced = add_no_special_tokens(tokenizer)
    rows = AutoConfig.from_pretrained(trained_on).get_text_config().vocab_size
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:  # added, without a row
        tokenizer.pad_token = form.eos_token
    tokenizer.save_pretrained(folder)
    # transformers before 5 goes by these, llama.cpp too.
    stated = {"add_bos_token": False, "add_eos_token": False} if silenced else {}
    if (legacy := getattr(tokenizer, "legacy", None)) is not None:
        stated["legacy"] = legacy  # which is not saved, and decides on spaces after control tokens
    _update(folder / "tokenizer_config.json", lambda config: _readable_by_v4(config) | stated)
    ends = {
        "eos_token_id": form.stop_ids[0] if len(form.stop_ids) == 1 else form.stop_ids,
        "pad_token_id": tokenizer.pad_token_id,
    }
    _update(folder / "config.json", lambda config: config | _v4_rope(config) | ends)
    _update(folder / "generation_config.json", lambda config: config | ends)


def _readable_by_v4(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json as transformers 4.57 reads it too, for the same token ids."""
    dropped = ("backend", "is_local", "local_files_only")
    config = {key: value for key, value in config.items() if key not in dropped}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _v4_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters under the names of transformers 4, which else takes its defaults."""
    parameters = config.get("rope_parameters") or {}
    local = parameters.get("sliding_attention", {})
    scaling = dict(parameters.get("full_attention", parameters))
    named = {key: scaling.pop(key, None) for key in ("rope_theta", "partial_rotary_factor")}
    named["rope_local_base_freq"] = local.get("rope_theta")
    if config["model_type"] == "gpt_neox":
        named["rotary_emb_base"] = named["rope_theta"]
        named["rotary_pct"] = named["partial_rotary_factor"]
    kind, original = scaling.get("rope_type", "default"), "original_max_position_embeddings"
    if kind == "longrope" and "factor" not in scaling:  # Phi takes three keys and no others
        named[original] = scaling.get(original)
        factors = {key: scaling[key] for key in ("short_factor", "long_factor")}
        named["rope_scaling"] = {"type": kind, **factors}
    elif kind != "default":
        named["rope_scaling"] = scaling
    return {key: value for key, value in named.items() if value is not None}


def _update(path: Path, change: Any) -> None:
    config = files.read_json(path) if path.exists() else {}
    files.write_json(path, change(config))  # renamed into place: a linked original stays as it is
