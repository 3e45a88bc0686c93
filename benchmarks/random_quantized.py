"""A quantized model with random weights, made a layer at a time: no file, no network, no fp32 copy.

Memory does not depend on what the weights are. So a 70B model's steps can be measured where its
weights are not, and where its half-precision form would not fit.
"""

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from stages.shared.core import progress
from stages.shared.model import attention
from stages.shared.weights import bnb

SPREAD = 0.02  # standard deviation of the weights: small enough for finite losses


def qlora_model(
    config: PretrainedConfig,
    rank: int,
    device: torch.device,
    *,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> PeftModel:
    """An NF4 model of this config with a LoRA adapter on all linear layers, in training mode."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.NAME
        )
    dense = get_keys_to_not_convert(base)
    layers = dict(base.named_modules())
    with progress.bar(total=len(layers), desc="random weights", unit="layer") as bar:
        for name, layer in layers.items():
            if type(layer) is nn.Linear and should_convert_module(name, dense):
                parent, _, last = name.rpartition(".")
                setattr(layers[parent], last, _quantized(layer, device, double_quant, dtype))
            else:
                _fill(layer, config, device)
            bar.update()
    base.tie_weights()
    base.is_loaded_in_4bit = True  # what peft chooses its layers by
    bnb.guard(base, device)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    return get_peft_model(base.requires_grad_(False), lora).train()


def _quantized(
    layer: nn.Linear, device: torch.device, double_quant: bool, dtype: torch.dtype
) -> Linear4bit:
    bias = layer.bias is not None
    made = Linear4bit(
        layer.in_features, layer.out_features, bias=bias, compute_dtype=dtype, device="meta"
    )
    weight = torch.randn(layer.out_features, layer.in_features, dtype=dtype, device=device)
    made.weight = Params4bit(
        weight * SPREAD,
        requires_grad=False,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=made,
    )
    if bias:
        made.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype, device=device))
    return made.to(device)  # where it is quantized


def _fill(layer: nn.Module, config: PretrainedConfig, device: torch.device) -> None:
    """Give a dense layer its own weights; buffers (rotary frequencies) are computed anew."""
    for name, weight in layer.named_parameters(recurse=False):
        filled = torch.randn(weight.shape, dtype=weight.dtype, device=device) * SPREAD
        layer.register_parameter(name, nn.Parameter(filled, requires_grad=False))
    if any(buffer.is_meta for buffer in layer.buffers(recurse=False)):
        with torch.device(device):
            fresh = type(layer)(config)
        for name, buffer in fresh.named_buffers(recurse=False):
            layer.register_buffer(name, buffer, persistent=False)
