"""The one way to load a model, so that every stage computes with the same weights."""

# ruff: noqa: E402  (the hub is shut off and the loggers are quiet before the libraries are there)

import os
import warnings
from pathlib import Path
from typing import cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a stage that loads a model never needs the hub
# oneDNN compiles each product for one shape, and conversations have many lengths. It keeps 0.3 MB
# of it, and the layer above it 0.26 MB that describe it: a thousand of each unless told otherwise.
# A micro-batch has about 50 shapes: 64 compile hardly more often, 32 three times as often.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
warnings.filterwarnings("ignore", message="`loftq_config` specified")  # noted, not asked for

from stages.shared.bnb import Linear4bit, Linear8bitLt, Params4bit  # before peft imports it

# isort: split
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from stages.shared import attention, precision
from stages.shared.core.errors import UserError

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def compute_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """What a model's matrix products run in: its own dtype, or fp32 (`computed_in`)."""
    return precision.computed_in(stored_dtype(folder), device.type)


def stored_dtype(folder: Path) -> torch.dtype:
    """What a model's weights are in that are not quantized, as its config says.

    Raises:
        FileNotFoundError: there is no config.
    """
    (folder / "config.json").open().close()  # transformers would ask the hub
    return AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype or torch.float32


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load base, quantized or merged weights from safetensors, in evaluation mode.

    Args:
        folder: holds config.json and *.safetensors.
        device: where the weights go.
        dtype: of the weights that are not quantized; None for the dtype that the model computes in.

    Raises:
        UserError: the folder holds no safetensors.
    """
    require_safetensors(folder)
    dtype = dtype or compute_dtype(folder, device)
    model = _from_pretrained(folder, device, dtype)
    guard_quantized_layers(model, device)
    if model.dtype != dtype:  # of a quantized model, transformers leaves the rest as it is stored
        _cast(model, model.dtype, dtype)
    return model.eval()


def _from_pretrained(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """With our attention, or where an architecture cannot have it (Gemma 2, gpt-oss), its own."""
    for implementation in (attention.NAME, "sdpa", "eager"):
        try:
            return AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=implementation,
            )
        except (KeyError, ValueError) as error:
            refused = error
    raise refused


def _cast(model: nn.Module, found: torch.dtype, wanted: torch.dtype) -> None:
    """Cast parameters, and no buffers: rotary frequencies stay in fp32."""
    for parameter in model.parameters():
        if parameter.dtype == found:
            parameter.data = parameter.data.to(wanted)


def require_safetensors(folder: Path) -> None:
    """Refuse a folder without safetensors, which transformers would search for pickles.

    Raises:
        UserError: the folder holds no safetensors.
    """
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: no *.safetensors in it; weights are read from safetensors only; "
            "convert the model, or run the stage that writes this folder"
        )


def load_adapted(adapter: Path, onto: Path, device: torch.device) -> PreTrainedModel | PeftModel:
    """The tuned model: the adapter on the weights it was trained on, or a fully tuned model itself.

    Args:
        adapter: a PEFT adapter, or a standalone model after a full fine-tune.
        onto: the (quantized) model below the adapter; not read after a full fine-tune.
        device: where the weights go.
    """
    if not is_adapter(adapter):
        return load_model(adapter, device)
    return attach(load_model(onto, device), adapter)


def attach(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Put a trained adapter on a model, frozen, without merging it."""
    return PeftModel.from_pretrained(model, adapter).eval()


def without_adapter(model: nn.Module) -> nn.Module:
    """The model of transformers that peft's adapter stands on; itself where there is none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter (and not a standalone model)."""
    return (folder / "adapter_config.json").is_file()


def guard_quantized_layers(model: nn.Module, device: torch.device) -> None:
    """Keep bitsandbytes from changing weights behind our back.

    On a CPU with AVX512-BF16, an evaluation forward of `Linear4bit` repacks the weight in place:
    every later backward pass, dequantization or merge reads garbage (measured: gradient norm 3.07
    before one evaluation, 0.50 after it). Products run in what the device has them in.

    The forward pass dequantizes to the layer's compute dtype, the backward pass (and whoever asks
    for the weights) to the dtype noted when they were quantized: here the two become one.
    """
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            layer.compute_dtype = precision.computed_in(layer.compute_dtype, device.type)
            cast(Params4bit, layer.weight).quant_state.dtype = layer.compute_dtype


def load_dequantized(folder: Path, device: torch.device) -> PreTrainedModel:
    """The weights that training saw, as an ordinary fp32 model on the CPU.

    Every 4-bit layer becomes an `nn.Linear` that holds exactly what its forward pass multiplies
    with, rounded to the compute dtype as there. An int8 layer holds its integers times their
    scales, unrounded; when it runs it also rounds the other factor, the activations. A model that
    is not quantized is only cast, which loses nothing.

    Args:
        folder: holds config.json and *.safetensors.
        device: whose forward pass is meant: a GPU rounds to bf16 what a CPU may multiply in fp32.

    Raises:
        UserError: the folder holds no safetensors.
    """
    require_safetensors(folder)
    model = _from_pretrained(folder, torch.device("cpu"), torch.float32)
    guard_quantized_layers(model, device)
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize(dtype=torch.float32)
        del model._weight_conversions  # how quantized weights were read; saving would reverse it
    return model.float().eval()


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that bitsandbytes holds, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}
