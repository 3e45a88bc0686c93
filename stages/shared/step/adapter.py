"""What is trained: an adapter on frozen weights, or all weights; and how it is saved."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import AutoConfig, PreTrainedModel

from stages.shared import models
from stages.shared.bnb import Linear8bitLt
from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.step import initialisation, masters
from stages.shared.step.anchored import ordinary_state
from stages.shared.step.config import Lora
from stages.shared.step.masters import as_saved


def load_for_lora(
    folder: Path, lora: Lora, device: torch.device, original: Path | None = None
) -> PeftModel:
    """Put a fresh adapter (fp32) on the frozen model.

    Args:
        folder: the (quantized) model.
        lora: the parameters.
        device: where it goes.
        original: the weights before they were quantized, which `lora.init` loftq reads.

    Raises:
        UserError: `lora` does not fit the model.
    """
    initialisation.refuse_dense(folder, lora)
    base = models.load_model(folder, device)
    _refuse_dora_on_int8(base, lora, device)
    saved = lora.modules_to_save or []
    rank, alpha = initialisation.rank_and_alpha(lora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=list(saved) or None,  # a copy: peft takes names out of the list
        ensure_weight_tying=_names_both_of_a_tie(base, saved),
        bias=lora.bias,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        base_model_name_or_path=folder.as_posix(),
    )
    _refuse_quantized_copies(base, saved)
    linear = sorted(
        {n.rpartition(".")[2] for n, m in base.named_modules() if hasattr(m, "in_features")}
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")  # see merging.py
            model = get_peft_model(base, config)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"params.yaml: lora.target_modules is {lora.target_modules!r}, which does not fit this "
            f"model ({reason:.120}); expected all-linear, or names or a pattern of "
            f"{', '.join(linear)}"
        ) from None
    _refuse_missing(model, lora)
    _refuse_useless_bias(model, lora)
    initialisation.initialise(model, lora, original)
    masters.widen(model)
    return model


def _names_both_of_a_tie(base: PreTrainedModel, saved: Sequence[str]) -> bool:
    """Whether embedding and head are one matrix and both are to be trained: then they stay one.

    Where only one is named, it gets a matrix of its own, and the merged model is not tied any more.
    """
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return False
    names = [name for name, module in base.named_modules() if module in ends]
    return all(any(name.endswith(end) for end in saved) for name in names)


def _refuse_dora_on_int8(base: PreTrainedModel, lora: Lora, device: torch.device) -> None:
    int8 = any(isinstance(m, Linear8bitLt) for m in models.quantized_layers(base).values())
    if lora.dora and int8 and device.type == "cpu":
        raise UserError(
            "params.yaml: lora.dora is true on int8 weights, whose scales peft loses on a CPU at "
            "the first step; expected other weights or a GPU; set lora.dora to false, or "
            "quantize.precision to nf4"
        )


def _refuse_quantized_copies(base: PreTrainedModel, saved: Sequence[str]) -> None:
    for name in models.quantized_layers(base):
        for end in saved:
            if f"{end}." in f"{name}.":
                raise UserError(
                    f"params.yaml: lora.modules_to_save names {end!r}, but the weights of {name} "
                    "are quantized and have no gradient; expected dense modules, such as lm_head "
                    "or embed_tokens; leave it to the adapter, or set quantize.precision to bf16"
                )


def _refuse_missing(model: PeftModel, lora: Lora) -> None:
    """Peft takes a list as long as one of its names is there; the others it passes over."""
    copies = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    names = lora.target_modules if isinstance(lora.target_modules, list) else []
    for key, ends, found in (
        ("target_modules", names, model.base_model.targeted_module_names),
        ("modules_to_save", lora.modules_to_save or [], copies),
    ):
        for end in ends:
            if any(f".{name}".endswith(f".{end}") for name in found):
                continue
            if key == "target_modules" and any(n.endswith(f".{end}") for n in copies):
                raise UserError(
                    f"params.yaml: lora.target_modules and lora.modules_to_save both name {end!r}; "
                    "expected an adapter on it, or a full copy; take it out of one of them"
                )
            raise UserError(
                f"params.yaml: lora.{key} names {end!r}, which this model does not have; "
                "expected names of its modules, such as q_proj, lm_head or embed_tokens"
            )


def _refuse_useless_bias(model: PeftModel, lora: Lora) -> None:
    biases = [n for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad]
    if lora.bias != "none" and not biases:
        where = "this model" if lora.bias == "all" else "any layer that lora.target_modules names"
        raise UserError(
            f"params.yaml: lora.bias is {lora.bias!r}, but there is no bias in {where}; expected "
            "'none'; set it to none"
        )


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


def save(model: PreTrainedModel | PeftModel, folder: Path, dtype: torch.dtype) -> None:
    """Write the adapter, or the standalone model in `dtype`: the same weights, the same bytes."""
    with as_saved(model, dtype):
        if isinstance(model, PeftModel):
            state = ordinary_state(model)
            model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
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
