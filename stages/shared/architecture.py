"""Which tensors a model has, from its config alone: nothing is read but that, nothing allocated."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from stages.shared.errors import UserError
from stages.shared.tensors import Kind, Tensor


def tensors_of_config(path: Path) -> list[Tensor]:
    """The tensors of the model that a `config.json` describes, built on torch's meta device.

    Raises:
        UserError: the file is missing, or describes no causal language model that is known.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: not found; expected the config of the base model; run `dvc repro fetch_model`"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path}: {reason}; expected the config of a causal language model that transformers "
            "knows; choose another base model"
        ) from None
    return tensors_of(model)


def tensors_of(model: PreTrainedModel) -> list[Tensor]:
    """The tensors of a model that is not quantized yet, in its own order.

    What bitsandbytes will quantize is asked of transformers, by the class of each layer: a config
    that says "4-bit" does not make it so. Experts that are fused into one 3-D tensor stay dense.
    """
    kept_dense = get_keys_to_not_convert(model)
    head = model.get_output_embeddings()
    seen: set[int] = set()
    tensors = []
    for name, layer, parameter in _parameters(model):
        kind = _kind(name, layer, parameter, head)
        shape = tuple(parameter.shape)
        tensors.append(
            Tensor(
                name=name,
                kind=kind,
                shape=shape[::-1] if isinstance(layer, Conv1D) else shape,
                quantizable=kind == "linear"
                and should_convert_module(name.removesuffix(".weight"), kept_dense),
                tied=id(parameter) in seen,
            )
        )
        seen.add(id(parameter))
    return tensors


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for path, layer in model.named_modules():
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{path}.{name}" if path else name, layer, parameter


def _kind(name: str, layer: nn.Module, parameter: nn.Parameter, head: nn.Module | None) -> Kind:
    """What a tensor is for, by the class of its layer."""
    class_name = type(layer).__name__.lower()
    if name.endswith("bias"):
        return "bias"
    if layer is head:
        return "head"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if type(layer) is nn.Linear or isinstance(layer, Conv1D):
        return "linear"
    if parameter.dim() == 3 and "expert" in class_name:
        return "experts"
    return "norm" if "norm" in class_name else "other"
