"""A model without values: built on meta as quantize and train would, then given fake tensors.

`Params4bit` and `Int8Params` of bitsandbytes refuse a fake tensor (`_make_subclass`). A fake
parameter takes their place whose class has their name, which peft asks for, and their attributes.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from stages.shared.model import attention
from stages.shared.weights.bnb import Int8Params, Linear4bit, Linear8bitLt, Params4bit, QuantState
from stages.shared.weights.precision import BLOCK, NESTED_BLOCK

CPU, META = torch.device("cpu"), torch.device("meta")
ATTRIBUTES_4BIT = ["blocksize", "compress_statistics", "quant_type", "quant_storage"]
ATTRIBUTES_4BIT += ["bnb_quantized", "module", "quant_state"]
FakeParams4bit = type("Params4bit", (FakeTensor,), {})
FakeInt8Params = type("Int8Params", (FakeTensor,), {})


def model_on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config, with the attention that `loading.load_model` would give it."""

    def build(attn: str) -> PreTrainedModel:
        options: Any = {"attn_implementation": attn, "trust_remote_code": False}
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **options)

    with META:
        return attention.with_supported(build)


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that transformers has bitsandbytes quantize: no head, no fused experts."""
    dense = get_keys_to_not_convert(model)
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and should_convert_module(name, dense)
    }


def quantize_on_meta(model: Any, precision: str, double_quant: bool, dtype: torch.dtype) -> None:
    """Replace quantizable layers by those of bitsandbytes; nothing in a dense precision."""
    if precision in ("nf4", "fp4", "int8"):
        for name, layer in quantizable(model).items():
            if precision == "int8":
                made: Any = _int8(layer)
            else:
                made = _four_bit(layer, precision, double_quant, dtype)
            made.bias = layer.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made)
    model.is_loaded_in_4bit = precision in ("nf4", "fp4")  # what peft chooses its layers by
    model.is_loaded_in_8bit = precision == "int8"


def to_fake(model: nn.Module) -> None:
    """Give all parameters and buffers fake tensors of a CPU; inside of a fake mode."""
    made: dict[int, nn.Parameter] = {}
    for layer in model.modules():
        for key, p in layer.named_parameters(recurse=False, remove_duplicate=False):
            if id(p) not in made:
                made[id(p)] = _fake_parameter(p)
            layer._parameters[key] = made[id(p)]
        for key, buffer in layer.named_buffers(recurse=False):
            layer._buffers[key] = _fake(buffer)


def state_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Constants of quantized layers that are neither parameters nor buffers."""
    tensors: list[torch.Tensor] = []
    for layer in model.modules():
        if isinstance(layer, Linear8bitLt):
            tensors.append(layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB)
        elif isinstance(layer, Linear4bit):
            state: Any = layer.weight.quant_state
            for part in filter(None, (state, state.state2)):
                tensors += [value for value in vars(part).values() if torch.is_tensor(value)]
    return tensors


def _fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=CPU)


def _fake_parameter(p: nn.Parameter) -> nn.Parameter:
    made: Any = nn.Parameter(_fake(p), requires_grad=p.requires_grad)
    if isinstance(p, Params4bit):
        made.__class__ = FakeParams4bit
        for key in ATTRIBUTES_4BIT:
            setattr(made, key, getattr(p, key))
        for part in filter(None, (p.quant_state, p.quant_state.state2)):
            for key, value in vars(part).items():
                if torch.is_tensor(value):
                    setattr(part, key, _fake(value))
    if isinstance(p, Int8Params):
        made.__class__ = FakeInt8Params
        made.has_fp16_weights, made.CB = False, made.data
        made.SCB = torch.empty(len(p), device=CPU)
    return made


def _four_bit(
    layer: nn.Linear, precision: str, double_quant: bool, dtype: torch.dtype
) -> Linear4bit:
    parameters = layer.weight.numel()
    blocks = -(-parameters // BLOCK)
    sizes = layer.in_features, layer.out_features
    made = Linear4bit(*sizes, bias=False, compute_dtype=dtype, device=META)
    made.support_avx512bf16_for_cpu = False
    with META:
        absmax = torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)
        code = torch.empty(16)
        state = QuantState(absmax, layer.weight.shape, code, BLOCK, precision, dtype)
        if double_quant:
            constants = {"absmax": torch.empty(-(-blocks // NESTED_BLOCK)), "dtype": torch.float32}
            nested = QuantState(**constants, code=torch.empty(256), blocksize=NESTED_BLOCK)
            state.offset, state.state2, state.nested = torch.empty(()), nested, True
        codes = torch.empty(-(-parameters // 2), 1, dtype=torch.uint8)
    made.weight = Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=double_quant,
        quant_type=precision,
        module=made,
        bnb_quantized=True,
    )
    return made


def _int8(layer: nn.Linear) -> Linear8bitLt:
    sizes = layer.in_features, layer.out_features
    made = Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, device=META)
    codes = torch.empty(layer.weight.shape, dtype=torch.int8, device=META)
    made.weight = Int8Params(codes, requires_grad=False)
    made.weight.SCB = torch.empty(layer.out_features, device=META)  # DoRA's norms are of weights
    return made
