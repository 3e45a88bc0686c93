"""The base model in the chosen precision, written as a folder that transformers loads."""

import gc
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from stages.quantize import loading
from stages.quantize.settings import FOUR_BIT, Quantize
from stages.quantize.stored import Weights
from stages.shared import models
from stages.shared.core import files, progress
from stages.shared.core.errors import UserError

SHARD_BYTES = 5_000_000_000  # a larger model becomes several files and an index
LOOKED_AT = 2**24  # elements at a time: little memory beside the model
FP16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Layout:
    """What the files do not say of the parameters in them.

    Attributes:
        looked_up: names of the embeddings, and of the head; never quantized.
        transposed: names of the matrices stored [in, out], as GPT-2's are.
        prefix: what the names of all parameters but the head begin with.
    """

    looked_up: frozenset[str]
    transposed: frozenset[str]
    prefix: str


def convert(base: Path, target: Path, settings: Quantize, device: torch.device) -> Layout:
    """Write the base in the chosen precision into a folder that exists.

    Args:
        base: config.json and *.safetensors.
        target: becomes config.json, generation_config.json and *.safetensors.
        settings: the precision.
        device: where it is quantized.

    Raises:
        UserError: the device cannot compute in the precision, a weight does not fit into it or
            is not finite, or the disk has no room.
    """
    models.require_safetensors(base)
    weights = Weights(base)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if problem := device_problem(settings, capability):
        raise UserError(problem)
    if settings.dense_dtype == "fp16" or settings.precision == "int8":
        require_fp16_range(weights, settings)
    model = loading.load(weights, settings, device)
    require_finite(model, base)
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}.values()  # tied ones once
    needed = sum(t.numel() * t.element_size() for t in tensors)
    files.require_space(target, needed, "the quantized model")
    save(model, base, target)
    found = layout(model)
    del model
    gc.collect()  # its modules refer to one another: without this it stays for seconds
    return found


def device_problem(settings: Quantize, capability: tuple[int, int] | None) -> str | None:
    """Why the device cannot compute in this precision, or None.

    Args:
        settings: the precision.
        capability: of the CUDA device; None for a CPU, which can do all of them.
    """
    if capability is None:
        return None
    found = f"this CUDA device has compute capability {capability[0]}.{capability[1]}"
    if settings.precision == "int8" and capability < (7, 5):
        return (
            f"quantize.precision is int8; {found}, int8 products need 7.5; "
            "set quantize.precision=nf4, or QLORA_DEVICE=cpu"
        )
    if settings.dense_dtype == "bf16" and capability < (8, 0):
        key = "precision" if settings.precision == "bf16" else "compute_dtype"
        return (
            f"quantize.{key} is bf16; {found}, bf16 needs 8.0; "
            f"set quantize.{key}=fp16, or QLORA_DEVICE=cpu"
        )
    return None


def require_fp16_range(base: Weights, settings: Quantize) -> None:
    """Refuse weights that become infinite in fp16; bitsandbytes quantizes int8 through fp16 too.

    Raises:
        UserError: names the first such tensor.
    """
    parameters = base.parameters
    with progress.bar(total=len(parameters), desc="range of fp16", unit="tensor") as bar:
        for stored in parameters:
            tensor = base.tensor(stored.name)
            # Old checkpoints hold masks, and the scalar to mask with, that no model reads.
            weight = tensor.is_floating_point() and tensor.ndim and tensor.numel()
            largest = float(tensor.float().abs().max()) if weight else 0.0
            if largest > FP16_MAX:
                key = "compute_dtype" if settings.precision in FOUR_BIT else "precision"
                raise UserError(
                    f"quantize.{key} is {getattr(settings, key)}; {base.folder}: {stored.name} "
                    f"holds {largest:g}, fp16 (which int8 goes through) ends at {FP16_MAX:g}; "
                    f"set quantize.{key}=bf16"
                )
            bar.update()


def require_finite(model: nn.Module, base: Path) -> None:
    """Refuse NaN and infinity, in weights or in the constants of quantized ones.

    Raises:
        UserError: names the first such tensor.
    """
    for name, tensor in model.state_dict().items():
        parts = tensor.flatten().split(LOOKED_AT) if tensor.is_floating_point() else ()
        if not all(part.isfinite().all() for part in parts):
            raise UserError(
                f"{base}: {name} holds NaN or infinity; expected finite weights; choose another "
                "model"
            )


def save(model: PreTrainedModel, base: Path, target: Path) -> None:
    """Write config and weights; the base's generation config is copied as it is.

    transformers refuses to write some generation configs that it reads, those of well-known models
    among them.

    Raises:
        OSError: the system did not take what was written.
    """
    model.generation_config = GenerationConfig.from_model_config(model.config)
    try:
        model.save_pretrained(target, max_shard_size=SHARD_BYTES)
    except SafetensorError as error:  # a full disk, as an error that says so to `errors.run`
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(target)) from None
    generation = base / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, target / generation.name)


def layout(model: PreTrainedModel) -> Layout:
    """Read from a model's modules what its files do not say."""
    head = model.get_output_embeddings()
    looked_up, transposed = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            looked_up[f"{name}.weight"] = module.weight
        if Conv1D in (type(module), getattr(module, "source_cls", None)):
            transposed.add(f"{name}.weight")
    # As they are saved: GPT-NeoX's head is not called in files what its module is called.
    as_saved = revert_weight_conversion(model, looked_up)
    return Layout(frozenset(as_saved), frozenset(transposed), model.base_model_prefix)
