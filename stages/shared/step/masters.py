"""fp32 masters of the trained base weights, and their values as a file will hold them.

With an adapter these are the weights of `lora.modules_to_save` and `lora.bias`; in full fine-tuning
all. bf16 has eight bits: it would round most steps of an optimizer away.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stages.shared.weights.bnb import Linear4bit, Linear8bitLt


def make_masters(model: nn.Module) -> None:
    """Cast the trained base weights to fp32; their layers still return the dtype that they did."""
    masters = set(base_weights(model))
    for layer in model.modules():
        if isinstance(layer, Linear4bit | Linear8bitLt) and layer.bias in masters:
            _add_bias_in_compute_dtype(layer)
        elif own := masters.intersection(layer.parameters(recurse=False)):
            _return_dtype(layer, next(iter(own)).dtype)
    for weight in masters:
        weight.data = weight.data.float()


@contextmanager
def as_saved(
    model: nn.Module, storage_dtype: torch.dtype, compute_dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Replace masters by the values that their file will hold, until the block ends.

    So the saved values are evaluated: rounded to the file's dtype, and cast to the compute dtype.
    LoRA weights are saved in fp32, as they are.
    """
    masters = {weight: weight.data for weight in base_weights(model)}
    for weight in masters:
        weight.data = weight.data.to(storage_dtype).to(compute_dtype or storage_dtype)
    try:
        yield
    finally:
        for weight, data in masters.items():
            weight.data = data


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
    def cast(module: nn.Module, inputs: object, output: object) -> object:
        return output.to(dtype) if isinstance(output, torch.Tensor) else output

    layer.register_forward_hook(cast)


def _add_bias_in_compute_dtype(layer: Linear4bit | Linear8bitLt) -> None:
    """Give each forward pass a cast copy of the bias; the gradient goes through it to the master.

    bitsandbytes casts a bias of another dtype in place: the master would be lost.
    """
    masters: list[nn.Parameter] = []  # while the layer computes

    def cast(module: Linear4bit | Linear8bitLt, inputs: tuple[torch.Tensor, ...]) -> None:
        masters.append(module.bias)
        dtype = getattr(module, "compute_dtype", None) or inputs[0].dtype
        module._parameters["bias"] = module.bias.to(dtype)

    def restore(module: nn.Module, *_: object) -> None:
        module._parameters["bias"] = masters.pop()

    layer.register_forward_pre_hook(cast)
    layer.register_forward_hook(restore, always_call=True)
