"""A model without values, on meta, then on fake tensors; and stand-ins for readers of values.

`Params4bit` and `Int8Params` of bitsandbytes refuse a fake tensor (`_make_subclass`). A fake
parameter takes their place whose class has their name, which peft asks for, and their attributes.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from stages.shared.model import attention, packing
from stages.shared.step.fused import cross_entropy, gpu, lora
from stages.shared.step.memory.setup import TrainingSetup
from stages.shared.weights import bnb, experts
from stages.shared.weights.bnb import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from stages.shared.weights.precision import DENSE_BYTES

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


def quantizable(model: nn.Module) -> dict[str, Any]:
    """The layers that transformers has bitsandbytes quantize: no head, no fused experts."""
    dense = get_keys_to_not_convert(model)
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) in (nn.Linear, Conv1D) and should_convert_module(name, dense)
    }


def quantize_on_meta(model: Any, precision: str, double_quant: bool, dtype: torch.dtype) -> None:
    """Replace quantizable layers by those of bitsandbytes; nothing in a dense precision."""
    model.is_loaded_in_4bit = precision in ("nf4", "fp4")  # what peft chooses its layers by
    model.is_loaded_in_8bit = precision == "int8"
    four_bit: Any = {"compute_dtype": dtype, "compress_statistics": double_quant}
    four_bit |= {"quant_type": precision, "device": META}
    for name, layer in quantizable(model).items() if precision not in DENSE_BYTES else ():
        weight = layer.weight.detach()  # [out, in]
        weight = weight.T if isinstance(layer, Conv1D) else weight
        if model.is_loaded_in_8bit:
            made: Any = Linear8bitLt(*weight.T.shape, False, has_fp16_weights=False, device=META)
        else:
            made = Linear4bit(*weight.T.shape, False, **four_bit)
            made.support_avx512bf16_for_cpu = False
        made.weight.data, made.bias = weight, layer.bias
        made.weight._quantize(META)
        model.set_submodule(name, made)


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


def _fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=CPU)


def _fake_parameter(p: nn.Parameter) -> nn.Parameter:
    made: Any = nn.Parameter(_fake(p), requires_grad=p.requires_grad)
    if isinstance(p, Params4bit):
        made.__class__ = FakeParams4bit
        for key in ATTRIBUTES_4BIT:
            setattr(made, key, getattr(p, key))
        for part, key, constant in _constants(p.quant_state):
            setattr(part, key, _fake(constant))
    if isinstance(p, Int8Params):
        made.__class__ = FakeInt8Params
        made.has_fp16_weights, made.CB = False, made.data
        made.SCB = torch.empty(len(p), device=CPU)
    return made


def _constants(state: Any) -> list[tuple[Any, str, torch.Tensor]]:
    """Tensors of a 4-bit weight's state and its nested one, each with its place."""
    parts = filter(None, (state, state.state2))
    named = [(part, key, value) for part in parts for key, value in vars(part).items()]
    return [place for place in named if torch.is_tensor(place[2])]


def state_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Constants of quantized layers that are neither parameters nor buffers."""
    tensors: list[torch.Tensor] = []
    for layer in model.modules():
        if isinstance(layer, Linear8bitLt):
            tensors.append(layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB)
        elif isinstance(layer, Linear4bit):
            state: Any = layer.weight.quant_state
            tensors += [constant for *_, constant in _constants(state)]
    return tensors


@contextmanager
def without_values(setup: TrainingSetup, dtype: torch.dtype) -> Iterator[None]:
    """Replace readers of values or addresses, and for CUDA the functions that differ on a CPU."""
    grouped_mm = torch._meta_registrations._meta_grouped_mm_common

    def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
        return torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device)

    def any_grouped_mm(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Kernels take other dtypes too; that of meta checks for bf16."""
        half = torch.bfloat16
        return grouped_mm(a.to(half), b.to(half), *args, **kwargs | {"out_dtype": None}).to(a.dtype)

    changes: list[tuple[Any, str, Any]] = [
        (torch._meta_registrations, "_meta_grouped_mm_common", any_grouped_mm),
        (packing, "to_device", to_device),
        (experts, "tokens_by_expert", _tokens_of_few_experts),
        (experts, "padded_size", lambda n: n + (n // 8 if setup.device == "cpu" else 0)),  # 9 %
        (lora, "dequantize_4bit_into", lambda _, state, buffer: buffer(state.shape, state.dtype)),
    ]
    if setup.device == "cuda":
        autocast = torch.is_autocast_enabled
        kernels = SimpleNamespace(  # in place, but for a dequantized matrix
            dequantize=lambda _, state, dtype: torch.empty(state.shape, dtype=dtype),
            swiglu_backward=lambda *_: None,
            cross_entropy=lambda *_: None,
        )
        changes += [
            (torch, "is_autocast_enabled", lambda *_: autocast("cpu")),
            (bnb.autograd, "MatMul8bitFp", bnb.autograd.MatMul8bitLt),
            (gpu, "on_gpu", lambda _: True),
            (gpu, "kernels", lambda: kernels),
            (gpu, "uses_liger", lambda _: False),
            (attention, "has_kernel", lambda *_: dtype != torch.float32),
            (attention, "to_device", to_device),
            (nn.functional, "dropout", _cuda_dropout),
        ]
    with ExitStack() as stack:
        for module, name, instead in changes:
            stack.enter_context(patch.object(module, name, instead))
        if setup.device == "cuda":
            sizes = cross_entropy.LOGITS_BYTES
            stack.enter_context(patch.dict(sizes, cpu=sizes["cuda"]))
        attention.cumulative_lengths.cache_clear()
        yield


def _tokens_of_few_experts(index: torch.Tensor, count: int) -> list[int]:
    """An upper bound, as routing depends on values: all tokens go to the same experts."""
    tokens, each = index.shape
    return [tokens] * each + [0] * (count - each)


def _cuda_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, *_: Any) -> torch.Tensor:
    """Dropout whose mask takes a byte an element, as CUDA's does; a CPU's is a factor."""
    return torch.native_dropout(x, p, True)[0] if training and p else x
