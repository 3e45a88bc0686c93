"""Merging of an adapter and its base weights into a standalone model."""

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
from stages.shared.chat.templates import Format, read_format
from stages.shared.core import files, machine
from stages.shared.core.errors import UserError, reading
from stages.shared.model.packing import Example, read_examples
from stages.shared.parallel.group import Member
from stages.shared.verify.agreement import first_positions
from stages.shared.weights import experts
from stages.shared.weights.precision import DTYPES


def merge(
    onto: str,
    dtype: str,
    adapter: Path,
    weights: Mapping[str, Path],
    tokenizer: Path,
    data: Path,
    folder: Path,
    member: Member | None = None,
) -> dict[str, Any]:
    """Write a standalone model into the existing `folder`, verify it, and return its metrics.

    `onto` the weights of this name (quantized or original), in a `dtype` (fp16, bf16 or fp32).
    `adapter` is a standalone model after full fine-tuning. `member`: this process's place where
    torchrun or Slurm has started the devices; the others `follow`.
    """
    quantized, device = weights["quantized"], machine.device()
    refuse_original(adapter, onto)
    examples = held_out(data)
    model = verify.load_trained(adapter, quantized, device)
    trained = verify.predict(model, examples)
    if isinstance(model, PeftModel):
        if onto == "original":
            del model
            model = verify.load_trained(adapter, weights[onto], device)
        merge_adapter(model, folder, DTYPES[dtype])
    else:
        files.link_folder(adapter, folder)
    del model
    make_standalone(folder, quantized, tokenizer, read_format(data / "format.json"))
    models, required = (folder, adapter, quantized), onto == "quantized"
    metrics = verify.verify(models, trained, examples, device, required=required, member=member)
    return {"onto": onto, **metrics, "bytes": files.folder_bytes(folder)}


def follow(member: Member, adapter: Path, weights: Mapping[str, Path], data: Path) -> None:
    """Verify with the first process, as one of those that write nothing."""
    models = (adapter, adapter, weights["quantized"])  # the first process's count
    verify.agreement_as_run(models, held_out(data), member[1], member)


def held_out(data: Path) -> list[Example]:
    """The conversations that a merge is verified on."""
    return first_positions(read_examples(data / "eval.parquet"), verify.POSITIONS)


def merge_adapter(tuned: PeftModel, folder: Path, dtype: torch.dtype) -> None:
    """Add the adapter to its dequantized weights in fp32 on the CPU, round once, and save.

    `merge_and_unload()` on quantized layers quantizes the sum again: that model agrees with the
    trained one in only 74 % of top-1 tokens.
    """
    untie_embeddings(tuned)
    with warnings.catch_warnings():
        # Embedding and head are untied on purpose where only one was trained.
        warnings.filterwarnings("ignore", ".*tie")
        merged = tuned.merge_and_unload().to(dtype)
    restore_conv1d(merged)
    for name, weight in merged.named_parameters():
        if not all(extreme.isfinite() for extreme in weight.aminmax()):
            raise UserError(
                f"params.yaml: merge.dtype is fp16, which ends at 65504, but {name} holds larger "
                "weights. Set merge.dtype to bf16 or fp32."
            )
    experts.save(merged, folder)


def restore_conv1d(model: PreTrainedModel) -> None:
    """Turn linear layers, [out, in], back into GPT-2's Conv1D, [in, out]; quantization did it."""
    with torch.device("meta"):
        stored = type(model)(model.config)
    for name, layer in stored.named_modules():
        if isinstance(layer, Conv1D) and isinstance(loaded := model.get_submodule(name), nn.Linear):
            transposed = Conv1D(layer.nf, layer.nx)
            transposed.weight = nn.Parameter(loaded.weight.t().contiguous())
            transposed.bias = loaded.bias
            model.set_submodule(name, transposed)


def untie_embeddings(tuned: PeftModel) -> None:
    """Untie embedding and head where either has LoRA: merged into one matrix it would change both.

    Those trained in full (`modules_to_save`) are copies already, and one tied copy if both are.
    """
    ends = (tuned.get_input_embeddings(), tuned.get_output_embeddings())
    adapted = [end for end in ends if isinstance(end, LoraLayer)]
    if adapted and ends[0].weight is ends[1].weight:
        layer = adapted[0].get_base_layer()
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def refuse_original(tuned: Path, onto: str) -> None:
    """Raise a UserError if the result of training does not fit the original weights."""
    reason = None
    if not loading.is_adapter(tuned):
        reason = "train.method full leaves a whole model and no adapter"
    elif files.read_json(tuned / "adapter_config.json").get("loftq_config"):
        reason = "lora.init loftq compensates a quantization error that they do not have"
    if reason and onto == "original":
        raise UserError(
            f"params.yaml: merge.onto is 'original', but {reason}. Set merge.onto to quantized."
        )


def make_standalone(folder: Path, quantized: Path, tokenizer_folder: Path, form: Format) -> None:
    """Add the tokenizer, with training's chat template and end token, and the stop tokens."""
    with reading(quantized / "config.json"):
        rows = int(AutoConfig.from_pretrained(quantized).get_text_config().vocab_size)
    tokenizer = loading.save_tokenizer(tokenizer_folder, folder, form.model_dump(), rows)
    ends = {
        "eos_token_id": form.stop_ids[0] if len(form.stop_ids) == 1 else form.stop_ids,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # By a rename, which leaves a linked original as it is.
    config = files.read_json(folder / "config.json")
    config.pop("output_router_logits", None)  # a mixture cannot generate with them
    files.write_json(folder / "config.json", config | _v4_rope(config) | ends)
    generation = folder / "generation_config.json"
    known = files.read_json(generation) if generation.exists() else {}
    files.write_json(generation, known | ends)


def _v4_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters by their names in transformers 4, which ignores those of 5."""
    parameters = config.get("rope_parameters") or {}
    local = parameters.get("sliding_attention", {})
    scaling = dict(parameters.get("full_attention", parameters))
    named = {key: scaling.pop(key, None) for key in ("rope_theta", "partial_rotary_factor")}
    named["rope_local_base_freq"] = local.get("rope_theta")
    if config["model_type"] == "gpt_neox":
        named["rotary_emb_base"] = named["rope_theta"]
        named["rotary_pct"] = named["partial_rotary_factor"]
    kind, original = scaling.get("rope_type", "default"), "original_max_position_embeddings"
    if kind == "longrope" and "factor" not in scaling:  # Phi accepts only these keys
        named[original] = scaling.get(original)
        factors = {key: scaling[key] for key in ("short_factor", "long_factor")}
        named["rope_scaling"] = {"type": kind, **factors}
    elif kind != "default":
        named["rope_scaling"] = scaling
    return {key: value for key, value in named.items() if value is not None}
