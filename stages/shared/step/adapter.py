"""The model that is trained: LoRA on frozen weights, or all weights; and how it is saved."""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from stages.shared.core import bounds, files
from stages.shared.core.errors import UserError, reading
from stages.shared.model import expert_adapters, loading
from stages.shared.step import initialisation, targets
from stages.shared.step.config import Lora
from stages.shared.step.fused.lora import ADAPTER
from stages.shared.step.masters import as_saved, make_masters
from stages.shared.weights import bnb, experts


def load_for_lora(
    folder: Path,
    lora: Lora,
    device: torch.device,
    original: Path | None = None,
    *,
    on_cpu: bool = False,
) -> PeftModel:
    """Load a frozen model with a fresh fp32 adapter; UserError where it does not fit.

    `original` is the folder of the weights before quantization, for LoftQ; `on_cpu` as in
    `loading.load_model`.
    """
    base = loading.load_model(folder, device, on_cpu=on_cpu)
    _refuse_endless_pattern(base, lora)
    targets.refuse_without_experts(base, lora)
    _refuse_for_precision(base, lora, device)
    rank, alpha = initialisation.rank_and_alpha(lora)
    mixture, rslora = bool(experts.layers(base)), lora.rslora
    if mixture and rslora:  # peft doubles the rank where it fuses gate and up: scale by alpha / r
        alpha, rslora = alpha * math.sqrt(rank), False
    saved = lora.modules_to_save or []
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        **targets.of_mixture(base, lora) if mixture else {"target_modules": lora.target_modules},
        modules_to_save=list(saved) or None,  # a copy: peft takes names out of the list
        ensure_weight_tying=_saves_both_ends_of_a_tie(base, saved),
        bias=lora.bias,
        use_rslora=rslora,
        use_dora=lora.dora,
        base_model_name_or_path=folder.as_posix(),
    )
    linear = (n for n, m in base.named_modules() if hasattr(m, "in_features"))
    names = sorted({name.rpartition(".")[2] for name in linear})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")  # see merge.py
            with expert_adapters.adapting(base):
                model = cast(PeftModel, get_peft_model(base, config))
    except TypeError:  # of peft, for an `nn.ModuleList`
        raise UserError(
            f"lora.modules_to_save: {saved!r:.60} takes in a list of modules, which peft cannot "
            "copy. Name dense modules, such as lm_head."
        ) from None
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"lora.target_modules: {lora.target_modules!r} does not fit this model ({reason:.120})."
            f" Use all-linear, or names or a pattern of {', '.join(names)}."
        ) from None
    config.modules_to_save = list(saved) or None  # peft knows no tie of `wte` alone
    _refuse_missing(model, lora)
    _refuse_embedding_with_mask(model)
    if lora.init != "default":
        before = original if lora.init == "loftq" else None
        initialisation.initialise(model, lora, before)
    if lora.dora:
        initialise_magnitudes(model)
    make_masters(model)
    return model


def initialise_magnitudes(model: PeftModel) -> None:
    """DoRA's: peft measures them before the adapter is initialised, and rounds them to bf16."""
    for layer in model.modules():
        magnitudes: Any = getattr(layer, "lora_magnitude_vector", {})
        if ADAPTER in magnitudes and isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            base, scale = layer.get_base_layer(), layer.scaling[ADAPTER]
            factors = {k: getattr(layer, k)[ADAPTER].weight for k in ("lora_A", "lora_B")}
            magnitudes[ADAPTER].update_layer(base_layer=base, scaling=scale, **factors)


def load_for_full(folder: Path, device: torch.device, *, on_cpu: bool = False) -> PreTrainedModel:
    """Load all weights as fp32 masters; UserError where they are quantized, or fp16.

    `on_cpu`: as they are stored, on the CPU, for `shards.Shards` to make masters of.
    """
    with reading(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder)
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized or config.dtype == torch.float16:
        reason = "have no gradient" if quantized else "give NaN at the first step"
        raise UserError(
            f"train.method: full cannot train {'quantized' if quantized else 'fp16'} weights, "
            f"which {reason}. Set quantize.precision to bf16 or fp32, or train.method to lora."
        )
    dtype = loading.stored_dtype(folder) if on_cpu else torch.float32
    model = loading.load_model(folder, device, dtype=dtype, on_cpu=on_cpu)
    return model.requires_grad_(True)


def save(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    dtype: torch.dtype,
    gathered: Mapping[nn.Parameter, torch.Tensor] | None = None,
) -> None:
    """Write the adapter, or the standalone model in `dtype`: the same weights, the same bytes.

    `gathered`: whole matrices of a model that is divided among processes.
    """
    with as_saved(model, dtype):
        if isinstance(model, PeftModel):
            state = initialisation.ordinary_state(model)
            model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
            _rename(folder / SAFETENSORS_WEIGHTS_NAME, model)
            _settle(folder / "adapter_config.json", targets.on_fused_experts(model))
            (folder / "README.md").unlink(missing_ok=True)
        else:
            model.config.dtype = dtype
            experts.save(model, folder, gathered)


def _rename(path: Path, model: PeftModel) -> None:
    """Give the tensors of a mixture the names and the fused experts of the hub's files."""
    tensors = load_file(path)
    if experts.layers(model):
        expert_adapters.fuse(model, tensors)
        names = expert_adapters.saved_names(model, tensors)
        renamed = {names[name]: tensor for name, tensor in tensors.items()}
        save_file(renamed, path, metadata={"format": "pt"})


def _settle(path: Path, changes: dict[str, Any]) -> None:
    """Peft writes lists from sets: unsorted, every later stage would run again."""
    config = json.loads(path.read_text()) | changes
    settled = {k: sorted(v) if isinstance(v, list) else v for k, v in sorted(config.items())}
    files.write_json(path, settled)


def _saves_both_ends_of_a_tie(base: PreTrainedModel, saved: Sequence[str]) -> bool:
    """Whether embedding and head are one matrix and both are trained: then they stay tied.

    Where only one is named, it gets a matrix of its own, and the merged model is not tied any more.
    """
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return False
    names = [name for name, module in base.named_modules() if module in ends]
    return all(any(name.endswith(end) for end in saved) for name in names)


def _refuse_for_precision(base: PreTrainedModel, lora: Lora, device: torch.device) -> None:
    quantized = bnb.quantized_layers(base)
    if lora.init == "loftq" and not quantized:
        raise UserError(
            "lora.init: loftq needs quantized weights. Set quantize.precision to nf4, fp4 or int8, "
            "or lora.init to default."
        )
    int8 = any(isinstance(layer, bnb.Linear8bitLt) for layer in quantized.values())
    if lora.dora and int8 and device.type == "cpu":
        raise UserError(
            "lora.dora: on a CPU, peft loses the scales of int8 weights at the first step. Set "
            "lora.dora to false, or quantize.precision to nf4."
        )
    for end in lora.modules_to_save or []:
        for name in quantized:
            if f"{end}." in f"{name}.":
                raise UserError(
                    f"lora.modules_to_save: {end!r} takes in {name}, whose quantized weights have "
                    "no gradient. Name dense modules, such as lm_head."
                )


def _refuse_endless_pattern(base: PreTrainedModel, lora: Lora) -> None:
    """Match names as peft does; `(.*)*x` takes exponential time."""
    if not isinstance(lora.target_modules, str):
        return
    try:
        with bounds.limited():
            for name, _ in base.named_modules():
                re.fullmatch(lora.target_modules, name)
    except bounds.Exceeded as exceeded:
        raise UserError(
            f"lora.target_modules: {lora.target_modules!r:.80} {exceeded} to match the names of "
            "this model's modules. Write a simpler pattern, or a list of names."
        ) from None


def _refuse_embedding_with_mask(model: PeftModel) -> None:
    """Peft calls an embedding with token ids alone; OPT's positions are called with a mask."""
    for name, layer in model.named_modules():
        table = layer.get_base_layer() if isinstance(layer, LoraLayer) else None
        if isinstance(table, nn.Embedding) and len(signature(table.forward).parameters) > 1:
            raise UserError(
                f"lora.target_modules: {name} is a {type(table).__name__}, which peft "
                "cannot adapt. Take it out of them."
            )


def _refuse_missing(model: PeftModel, lora: Lora) -> None:
    """Peft passes over names without a module, as long as one of them has one."""
    copies = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    named = lora.target_modules if isinstance(lora.target_modules, list) else []
    tuner = model.base_model
    routers = [name.removesuffix(".weight") for name in tuner.targeted_parameter_names]
    for key, ends, modules in (
        ("target_modules", named, [*tuner.targeted_module_names, *routers]),
        ("modules_to_save", lora.modules_to_save or [], copies),
    ):
        for end in ends:
            if any(f".{name}".endswith(f".{end}") for name in modules):
                continue
            if key == "target_modules" and any(name.endswith(f".{end}") for name in copies):
                raise UserError(
                    f"lora.target_modules: {end!r} is in lora.modules_to_save too. Choose an "
                    "adapter or a full copy."
                )
            raise UserError(
                f"lora.{key}: this model has no module {end!r}. Name modules that it has, such "
                "as q_proj, lm_head or embed_tokens."
            )
    biases = [n for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad]
    if lora.bias != "none" and not biases:
        where = "this model" if lora.bias == "all" else "the layers of lora.target_modules"
        raise UserError(f"lora.bias: there is no bias in {where}. Set it to none.")
