"""What is trained: an adapter on frozen weights, or all weights; and how it is saved."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, PreTrainedModel

from stages.shared import files, models
from stages.shared.errors import UserError
from stages.train.settings import Lora


def load_for_lora(folder: Path, lora: Lora, device: torch.device) -> PeftModel:
    """Put a fresh adapter (fp32) on the frozen model.

    Raises:
        UserError: `lora.target_modules` or `lora.modules_to_save` match nothing.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        bias=lora.bias,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        base_model_name_or_path=folder.as_posix(),
    )
    base = models.load_model(folder, device)
    linear = sorted(
        {n.rpartition(".")[2] for n, m in base.named_modules() if hasattr(m, "in_features")}
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise UserError(
            f"params.yaml: lora.target_modules is {lora.target_modules!r}, which does not fit this "
            f"model ({error}); expected all-linear, or names or a pattern of {', '.join(linear)}"
        ) from None
    missing = [m for m in lora.modules_to_save or [] if not _saves(model, m)]
    if missing:
        raise UserError(
            f"params.yaml: lora.modules_to_save names {missing[0]!r}, which this model does not "
            f"have; expected names of its modules, such as lm_head or embed_tokens"
        )
    return model


def _saves(model: PeftModel, module: str) -> bool:
    return any(f"{module}.modules_to_save" in name for name, _ in model.named_parameters())


def load_for_full(folder: Path, device: torch.device) -> PreTrainedModel:
    """Load all weights as fp32 masters, to be trained.

    Raises:
        UserError: the weights are quantized, or fp16.
    """
    config = AutoConfig.from_pretrained(folder)
    reason = None
    if getattr(config, "quantization_config", None) is not None:
        reason = "quantized weights have no gradient"
    elif config.dtype == torch.float16:
        reason = "fp16 weights overflow in their optimizer (NaN at the first step)"
    if reason:
        raise UserError(
            f"params.yaml: train.method is 'full', but the weights that quantize.precision gives "
            f"cannot be trained: {reason}; set quantize.precision to bf16 or fp32, "
            "or train.method to lora"
        )
    model = models.load_model(folder, device, dtype=torch.float32)
    return model.requires_grad_(True)


@contextmanager
def as_saved(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> Iterator[None]:
    """Give a fully tuned model the weights that its file will hold, and the masters back after.

    What is evaluated is then exactly what is kept. An adapter is saved as it is, in fp32.
    """
    if isinstance(model, PeftModel) or dtype == torch.float32:
        yield
        return
    masters = {name: p.data for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = p.data.to(dtype)
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.data = masters[name]


def save(model: PreTrainedModel | PeftModel, folder: Path, dtype: torch.dtype) -> None:
    """Write the adapter, or the standalone model in `dtype`: the same weights, the same bytes."""
    with as_saved(model, dtype):
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder), save_embedding_layers=False)
            _settle_config(folder / "adapter_config.json")
            (folder / "README.md").unlink(missing_ok=True)
        else:
            model.config.dtype = dtype
            model.save_pretrained(folder)


def _settle_config(path: Path) -> None:
    """Peft writes lists from sets: sort them, or every later stage would run again."""
    config = json.loads(path.read_text())
    settled = {k: sorted(v) if isinstance(v, list) else v for k, v in sorted(config.items())}
    files.write_json(path, settled)
