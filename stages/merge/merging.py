"""One standalone model from an adapter and the weights it was trained on."""

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.shared import models
from stages.shared.chat.templates import Format
from stages.shared.chat.tokenizer import add_no_special_tokens, load_tokenizer
from stages.shared.core import files
from stages.shared.core.errors import UserError


def merge_adapter(
    adapter: Path, onto: Path, folder: Path, dtype: torch.dtype, device: torch.device
) -> None:
    """Add the adapter to the weights in fp32, round once, and save.

    Not `merge_and_unload()` on quantized layers: that quantizes the sum again, and the merged
    model then agrees with what was trained in only 74 % of its most likely tokens.

    Args:
        adapter: a PEFT adapter.
        onto: the weights; dequantized first where they are quantized.
        folder: an existing folder for the model.
        dtype: what the sum is rounded to.
        device: that trained; the sum is made on the CPU.

    Raises:
        UserError: a weight is too large for `dtype`.
    """
    tuned = models.attach(models.load_dequantized(onto, device), adapter)
    part_adapted_ends(tuned)
    with warnings.catch_warnings():
        # That embedding and head are tied no more is meant, where only one of them was trained.
        warnings.filterwarnings("ignore", ".*tie")
        merged = tuned.merge_and_unload().to(dtype)
    turn_as_stored(merged)
    for name, weight in merged.named_parameters():
        if not weight.isfinite().all():
            raise UserError(
                f"params.yaml: merge.dtype is fp16, but {name} holds weights above 65504; "
                "expected a type that they fit into; set merge.dtype to bf16 or fp32"
            )
    merged.save_pretrained(folder)


def turn_as_stored(model: PreTrainedModel) -> None:
    """GPT-2 stores its matrices [in, out], of which quantizing made linear layers, [out, in]."""
    with torch.device("meta"):
        stored = type(model)(model.config)
    for name, layer in stored.named_modules():
        found = model.get_submodule(name)
        if isinstance(layer, Conv1D) and isinstance(found, nn.Linear):
            turned = Conv1D(layer.nf, layer.nx)
            turned.weight = nn.Parameter(found.weight.t().contiguous())
            turned.bias = found.bias
            model.set_submodule(name, turned)


def part_adapted_ends(tuned: PeftModel) -> None:
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
    """Some of what is trained fits no other weights than those it was trained on.

    A full fine-tune changed every weight: there is no adapter. An adapter that began as LoftQ holds
    what quantization lost, which the original weights have already.

    Raises:
        UserError: `merge.onto` is `original` after one of them.
    """
    if onto != "original":
        return
    reason = None
    if not models.is_adapter(tuned):
        reason = "train.method full leaves a whole model and no adapter"
    elif files.read_json(tuned / "adapter_config.json").get("loftq_config"):
        reason = "with lora.init loftq the adapter holds what quantization lost, and they lost none"
    if reason:
        raise UserError(
            f"params.yaml: merge.onto is 'original'; {reason}; expected 'quantized'; "
            "set merge.onto to quantized"
        )


def make_standalone(folder: Path, trained_on: Path, tokenizer_folder: Path, form: Format) -> None:
    """Make `from_pretrained`, `apply_chat_template` and `generate` just work.

    Adds the tokenizer with the chat template and end token of training, and notes in the config
    the stop tokens and the precision that training computed in: what the model is run in unless
    its user says otherwise, whatever its file is stored in.
    """
    config = AutoConfig.from_pretrained(trained_on)
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = form.chat_template
    tokenizer.eos_token = form.eos_token
    silenced = add_no_special_tokens(tokenizer)
    rows = config.get_text_config().vocab_size
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:  # added, without a row
        tokenizer.pad_token = form.eos_token
    tokenizer.save_pretrained(folder)
    if silenced:  # transformers before 5 goes by these, llama.cpp too
        _add(folder / "tokenizer_config.json", {"add_bos_token": False, "add_eos_token": False})
    runs_in = str(config.dtype).removeprefix("torch.")
    ends = {
        "eos_token_id": form.stop_ids[0] if len(form.stop_ids) == 1 else form.stop_ids,
        "pad_token_id": tokenizer.pad_token_id,
    }
    _add(folder / "config.json", ends | {"dtype": runs_in})
    _add(folder / "generation_config.json", ends)


def _add(path: Path, values: dict[str, object]) -> None:
    config = files.read_json(path) if path.exists() else {}
    files.write_json(path, config | values)  # renamed into place: a linked original stays as it is
