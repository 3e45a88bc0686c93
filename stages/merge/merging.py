"""One standalone model from an adapter and the weights it was trained on."""

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from stages.shared import files, models
from stages.shared.errors import UserError
from stages.shared.prepared import Format


def merge_adapter(adapter: Path, onto: Path, folder: Path, dtype: torch.dtype) -> None:
    """Add the adapter to the weights in fp32, round once, and save.

    Not `merge_and_unload()` on quantized layers: that quantizes the sum again, and the merged
    model then agrees with what was trained in only 74 % of its most likely tokens.

    Args:
        adapter: a PEFT adapter.
        onto: the weights; dequantized first where they are quantized.
        folder: an existing folder for the model.
        dtype: what the sum is rounded to.
    """
    tuned = models.attach(models.load_dequantized(onto), adapter)
    merged: PreTrainedModel = tuned.merge_and_unload()  # type: ignore[assignment, operator]
    merged = merged.to(dtype)  # type: ignore[arg-type]
    merged.config.dtype = dtype
    merged.save_pretrained(folder)


def link_model(tuned: Path, folder: Path) -> None:
    """A fully tuned model is already standalone: give its files a second name."""
    for source in sorted(tuned.iterdir()):
        files.link_or_copy(source, folder / source.name)


def stored_dtype(folder: Path) -> torch.dtype:
    """What a model's weights are stored in; a merged model is stored like the original one."""
    return AutoConfig.from_pretrained(folder).dtype or torch.float32


def refuse_original(tuned: Path, onto: str) -> None:
    """A full fine-tune changed every weight: there is no adapter to put on the original ones.

    Raises:
        UserError: `merge.onto` is `original` after a full fine-tune.
    """
    if onto == "original" and not models.is_adapter(tuned):
        raise UserError(
            "params.yaml: merge.onto is 'original'; train.method full leaves a whole model and no "
            "adapter; expected 'quantized'; set merge.onto to quantized"
        )


def add_tokenizer(folder: Path, tokenizer_folder: Path, form: Format) -> None:
    """Make `apply_chat_template` and `generate` just work: template, end token, stop tokens."""
    tokenizer = models.load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = form.chat_template
    tokenizer.eos_token = form.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = form.eos_token
    tokenizer.save_pretrained(folder)
    stops = form.stop_ids[0] if len(form.stop_ids) == 1 else form.stop_ids
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        config = files.read_json(path) if path.exists() else {}
        path.unlink(missing_ok=True)  # it may be a link to another stage's file
        files.write_json(
            path, config | {"eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
        )
