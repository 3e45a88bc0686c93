"""The model's own weights that are trained: fp32 masters, and what their file will hold.

Beside an adapter they are those of `lora.modules_to_save` and `lora.bias`, in full fine-tuning all.
A weight in bf16 has eight bits: most steps of an optimizer would be rounded away.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stages.shared.bnb import Linear4bit, Linear8bitLt


def widen(model: nn.Module) -> None:
    """Make fp32 masters of the trained weights that are not an adapter's (those are fp32).

    The layers still answer in the dtype that they had: what follows them takes no other.
    """
    own = set(own_weights(model))
    for layer in model.modules():
        if isinstance(layer, Linear4bit | Linear8bitLt) and layer.bias in own:
            _lend_rounded_bias(layer)
        elif found := own.intersection(layer.parameters(recurse=False)):
            _answer_in(layer, next(iter(found)).dtype)
    for weight in own:
        weight.data = weight.data.float()


@contextmanager
def as_saved(
    model: nn.Module, kept: torch.dtype, computed: torch.dtype | None = None
) -> Iterator[None]:
    """Give trained weights the values that their file will hold, and the masters back after.

    What is evaluated is then exactly what is kept. An adapter's own matrices are kept in fp32.

    Args:
        model: that is trained.
        kept: what the file holds.
        computed: what the values come in; None for the same.
    """
    masters = {weight: weight.data for weight in own_weights(model)}
    for weight in masters:
        weight.data = weight.data.to(kept).to(computed or kept)
    try:
        yield
    finally:
        for weight, data in masters.items():
            weight.data = data


def own_weights(model: nn.Module) -> list[nn.Parameter]:
    """The trained weights that are not an adapter's, each once.

    With a layer's bias goes the vector beside it, trained or not: a norm takes both in one dtype.
    """
    found: dict[nn.Parameter, None] = {}
    for name, layer in model.named_modules():
        own = list(layer.parameters(recurse=False))
        if "lora_" not in name and any(map(_learns, own)):
            found |= dict.fromkeys(p for p in own if _learns(p) or p.ndim == 1)
    return list(found)


def _learns(weight: nn.Parameter | None) -> bool:
    return weight is not None and weight.requires_grad


def _answer_in(layer: nn.Module, dtype: torch.dtype) -> None:
    def cast(module: nn.Module, inputs: object, output: object) -> object:
        return output.to(dtype) if isinstance(output, torch.Tensor) else output

    layer.register_forward_hook(cast)


def _lend_rounded_bias(layer: Linear4bit | Linear8bitLt) -> None:
    """Have a quantized layer add its bias as ever, in the dtype that it computes in.

    bitsandbytes casts a bias of another dtype in place, for good: the master would be lost at the
    first forward pass. It gets a cast copy instead, through which the gradient reaches the master.
    """
    master = layer.bias

    def lend(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        dtype = getattr(module, "compute_dtype", None) or inputs[0].dtype
        module._parameters["bias"] = master.to(dtype)

    def take_back(module: nn.Module, *_: object) -> None:
        module._parameters["bias"] = master

    layer.register_forward_pre_hook(lend)
    layer.register_forward_hook(take_back, always_call=True)
