"""The model that is trained: LoRA on frozen weights, or all weights; and how it is saved.

Base weights that are trained (`lora.modules_to_save`, `lora.bias`; in full fine-tuning all) have
fp32 masters: bf16 has eight bits, and would round most steps of an optimizer away.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from stages.shared.core import files
from stages.shared.core.errors import UserError, reading
from stages.shared.model import expert_adapters, loading
from stages.shared.model.loading import ADAPTER
from stages.shared.step import initialisation, targets
from stages.shared.step.config import Lora
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
    targets.require_terminating_pattern(base, lora)
    _require_precision(base, lora, device)
    rank, alpha = initialisation.rank_and_alpha(lora)
    mixture, rslora = bool(experts.layers(base)), lora.rslora
    if lora.experts and not mixture:
        raise UserError(
            "lora.experts: this model has no experts that an adapter could lie on. Set it to null."
        )
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
    targets.require_modules(model, lora)
    if lora.init != "default":
        initialisation.initialise(model, lora, original if lora.init == "loftq" else None)
    if lora.dora:
        initialise_magnitudes(model)
    make_masters(model)
    return model


def _require_precision(base: PreTrainedModel, lora: Lora, device: torch.device) -> None:
    """Raise a UserError for what the precision of the weights does not allow."""
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


def _saves_both_ends_of_a_tie(base: PreTrainedModel, saved: Sequence[str]) -> bool:
    """Whether embedding and head are one matrix and both are trained: then they stay tied.

    Where only one is named, it gets a matrix of its own, and the merged model is not tied any more.
    """
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return False
    names = [name for name, module in base.named_modules() if module in ends]
    return all(any(name.endswith(end) for end in saved) for name in names)


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


def make_masters(model: nn.Module) -> None:
    """Cast the trained base weights to fp32; their layers still return the dtype that they did."""
    masters = set(base_weights(model))
    for layer in model.modules():
        if isinstance(layer, bnb.Linear4bit | bnb.Linear8bitLt) and layer.bias in masters:
            _add_bias_in_compute_dtype(layer)
        elif own := masters.intersection(layer.parameters(recurse=False)):
            _return_dtype(layer, next(iter(own)).dtype)
    for weight in masters:
        weight.data = weight.data.float()


def base_weights(model: nn.Module) -> list[nn.Parameter]:
    """The trained weights that are not LoRA's, each once.

    A layer's vectors count together, trained or not: a norm takes weight and bias in one dtype.
    """
    weights: dict[nn.Parameter, None] = {}
    for name, layer in model.named_modules():
        own = list(layer.parameters(recurse=False))
        if "lora_" not in name and any(p.requires_grad for p in own):
            weights |= dict.fromkeys(p for p in own if p.requires_grad or p.ndim == 1)
    return list(weights)


def _return_dtype(layer: nn.Module, dtype: torch.dtype) -> None:
    def cast_output(_: nn.Module, _inputs: object, output: object) -> object:
        return output.to(dtype) if isinstance(output, torch.Tensor) else output

    layer.register_forward_hook(cast_output)


def _add_bias_in_compute_dtype(layer: bnb.Linear4bit | bnb.Linear8bitLt) -> None:
    """Give each forward pass a cast copy of the bias; the gradient goes through it to the master.

    bitsandbytes casts a bias of another dtype in place: the master would be lost.
    """
    masters: list[nn.Parameter] = []  # while the layer computes

    def cast_bias(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        masters.append(module.bias)
        dtype = getattr(module, "compute_dtype", None) or inputs[0].dtype
        module._parameters["bias"] = module.bias.to(dtype)

    def restore_bias(module: nn.Module, *_: object) -> None:
        module._parameters["bias"] = masters.pop()

    layer.register_forward_pre_hook(cast_bias)
    layer.register_forward_hook(restore_bias, always_call=True)


@contextmanager
def as_saved(
    model: nn.Module, storage_dtype: torch.dtype, compute_dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Context in which masters have the values of their file, so that these are evaluated.

    They are rounded to the file's dtype and cast to the compute dtype. LoRA weights are saved in
    fp32, as they are.
    """
    masters = {weight: weight.data for weight in base_weights(model)}
    for weight in masters:
        weight.data = weight.data.to(storage_dtype).to(compute_dtype or storage_dtype)
    try:
        yield
    finally:
        for weight, data in masters.items():
            weight.data = data


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
        if not isinstance(model, PeftModel):
            model.config.dtype = dtype
            experts.save(model, folder, gathered)
            return
        state = initialisation.ordinary_state(model)
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
    if experts.layers(model):  # the names and the fused experts of the hub's files
        path = folder / SAFETENSORS_WEIGHTS_NAME
        tensors = load_file(path)
        expert_adapters.fuse(model, tensors)
        names = expert_adapters.saved_names(model, tensors)
        renamed = {names[name]: tensor for name, tensor in tensors.items()}
        save_file(renamed, path, metadata={"format": "pt"})
    # peft writes lists from sets: unsorted, every later stage would run again.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | targets.on_fused_experts(model)
    sorted_lists = {k: sorted(v) if isinstance(v, list) else v for k, v in sorted(config.items())}
    files.write_json(path, sorted_lists)
    (folder / "README.md").unlink(missing_ok=True)
