"""Models and adapters, loaded one way, so that every stage computes with the same weights."""

# ruff: noqa: E402  (caches are bounded and warnings silenced before the libraries are imported)

import os
import warnings
from pathlib import Path

# oneDNN compiles each matmul for one shape, and conversations have many lengths. It keeps 0.3 MB
# of it, and the layer above it 0.26 MB that describe it: a thousand of each unless told otherwise.
# A micro-batch has about 50 shapes: 64 compile hardly more often, 32 three times as often.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
warnings.filterwarnings("ignore", message="`loftq_config` specified")  # a note for the merge

from stages.shared.weights import bnb, precision  # before peft imports bitsandbytes
from stages.shared.weights.checkpoint import Weights, load_strictly, require_finite

# isort: split
import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.shared.model import attention


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a model's weights that are not quantized, as its config says."""
    (folder / "config.json").open().close()  # transformers would ask the hub
    return AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype or torch.float32


def compute_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """The dtype that a device computes a model in: its own, or fp32 (`precision.compute_dtype`)."""
    return precision.compute_dtype(stored_dtype(folder), device.type)


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A base, quantized or merged model, in evaluation mode.

    Args:
        folder: holds config.json and *.safetensors.
        device: where the weights go.
        dtype: of the weights that are not quantized; None for `compute_dtype`.

    Raises:
        UserError: a weight is missing, unexpected, of a wrong shape or not finite.
    """
    weights = Weights(folder)
    dtype = dtype or compute_dtype(folder, device)
    model = _load(weights, device, dtype)
    bnb.guard(model, device)
    if model.dtype != dtype:  # of a quantized model, transformers leaves the rest as it is stored
        _cast(model, model.dtype, dtype)
    return model.eval()


def _load(weights: Weights, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """With our attention, or where an architecture cannot have it (Gemma 2, gpt-oss), its own."""
    for implementation in (attention.NAME, "sdpa", "eager"):
        try:
            return load_strictly(
                weights,
                AutoModelForCausalLM,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=implementation,
            )
        except (KeyError, ValueError) as error:
            refused = error
    raise refused


def _cast(model: nn.Module, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Cast parameters, and no buffers: rotary frequencies stay in fp32."""
    for parameter in model.parameters():
        if parameter.dtype == stored:
            parameter.data = parameter.data.to(dtype)


def load_dequantized(folder: Path, device: torch.device) -> PreTrainedModel:
    """The weights that training saw, as an ordinary fp32 model on the CPU.

    Every 4-bit layer becomes an `nn.Linear` of exactly the numbers that its forward pass multiplies
    with, rounded to the compute dtype as there. An int8 layer holds its integers times their
    scales, unrounded; when it runs it also rounds the other factor, the activations. A model that
    is not quantized is only cast, which loses nothing.

    Args:
        folder: as of `load_model`.
        device: whose forward pass is meant: a GPU rounds to bf16 what a CPU may multiply in fp32.
    """
    model = _load(Weights(folder), torch.device("cpu"), torch.float32)
    bnb.guard(model, device)
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize(dtype=torch.float32)
        del model._weight_conversions  # of the reading of quantized weights; saving reverses it
    return model.float().eval()


def load_adapted(adapter: Path, onto: Path, device: torch.device) -> PreTrainedModel | PeftModel:
    """The tuned model: an adapter on the weights below it, or a fully tuned model itself."""
    if not is_adapter(adapter):
        return load_model(adapter, device)
    return attach(load_model(onto, device), adapter)


def attach(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Put a trained adapter on a model, frozen and not merged.

    Raises:
        UserError: a tensor of the adapter is missing, unexpected, of a wrong shape or not finite.
    """
    config = PeftConfig.from_pretrained(adapter)
    config.inference_mode = True
    weights = Weights(adapter)
    tuned = PeftModelForCausalLM(model, config)
    # By the names and shapes that peft would save; its own result leaves out `modules_to_save`.
    due = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    tensors = {name: weights.tensor(name) for name in weights.shapes}
    for name in sorted(due.keys() - tensors.keys()):
        raise weights.refusal(name, "is missing from the adapter")
    for name in sorted(tensors.keys() - due.keys()):
        raise weights.refusal(
            name, "is no tensor of the adapter that adapter_config.json describes"
        )
    for name, tensor in tensors.items():
        if tensor.shape != due[name].shape:
            shapes = f"{list(tensor.shape)}, but the model makes it {list(due[name].shape)}"
            raise weights.refusal(name, f"has shape {shapes}")
    require_finite(tensors, weights)
    set_peft_model_state_dict(tuned, tensors)
    return tuned.eval()


def without_adapter(model: nn.Module) -> nn.Module:
    """The model of transformers below an adapter; itself where there is none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter (and not a standalone model)."""
    return (folder / "adapter_config.json").is_file()
