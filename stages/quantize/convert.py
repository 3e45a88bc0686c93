"""Conversion of a transformers model to the chosen precision, quantized as it is read.

What was written has the precision's bits a parameter. All matrices count: transformers 5 fuses the
experts of a mixture into 3-D parameters, which bitsandbytes leaves in bf16 without a word.
"""

import gc
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import set_tqdm_hook

from stages.quantize.quantization_error import Base
from stages.shared.core import files
from stages.shared.core.errors import UserError, reading
from stages.shared.weights import heap
from stages.shared.weights.checkpoint import Stored, Weights, load_strictly, without_mxfp4
from stages.shared.weights.precision import DTYPES, stored_bytes

if TYPE_CHECKING:
    from stages.quantize.__main__ import Quantize

SHARD_BYTES = 5_000_000_000
FP16_MAX = torch.finfo(torch.float16).max
TABLE_BYTES = 16 * 4 + 256  # of a 4-bit matrix: codebook in fp32, and metadata in JSON, at most
NESTED_TABLE_BYTES = 256 * 4  # codebook of the constants
# For small dense matrices like a router; one dense linear layer among 30 × 7 exceeds it.
TOLERANCE = 0.01


def convert(base: Path, target: Path, settings: "Quantize", device: torch.device) -> Base:
    """Write the base in the chosen precision into an existing folder; returns its weights."""
    weights = Weights(base)
    if device.type == "cuda":
        require_capability(torch.cuda.get_device_capability(device), settings)
    if settings.dense_dtype == "fp16" or settings.precision == "int8":
        require_fp16_range(weights, settings)
    model = load(weights, settings, device)
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}.values()  # tied ones once
    needed = sum(t.numel() * t.element_size() for t in tensors)
    files.require_space(target, needed, "the quantized model")
    save(model, base, target)
    described = describe(model, weights, device)
    del model
    gc.collect()  # modules refer to each other
    return described


def require_capability(capability: tuple[int, int], settings: "Quantize") -> None:
    """Raise a UserError if a CUDA device cannot compute in the precision."""
    if settings.precision == "int8" and capability < (7, 5):
        key, needed, alternative = "precision", "7.5", "nf4"
    elif settings.dense_dtype == "bf16" and capability < (8, 0):
        key = "precision" if settings.precision == "bf16" else "compute_dtype"
        needed, alternative = "8.0", "fp16"
    else:
        return
    raise UserError(
        f"quantize.{key} is {getattr(settings, key)}, which needs compute capability {needed}, but "
        f"this CUDA device has {capability[0]}.{capability[1]}. "
        f"Set quantize.{key}={alternative}, or QLORA_DEVICE=cpu."
    )


def require_fp16_range(base: Weights, settings: "Quantize") -> None:
    """Raise a UserError for a weight that overflows fp16, through which int8 is quantized too."""
    for stored in heap.each(base.parameters, "range of fp16", "tensor"):
        tensor = base.tensor(stored.name)
        # A scalar is the mask value of an old checkpoint, which no model reads.
        weight = tensor.is_floating_point() and tensor.ndim and tensor.numel()
        largest = float(torch.stack(tensor.float().aminmax()).abs().max()) if weight else 0.0
        if largest > FP16_MAX:
            key = "compute_dtype" if settings.is_four_bit else "precision"
            raise UserError(
                f"quantize.{key} is {getattr(settings, key)}; {base.folder}: {stored.name} "
                f"holds {largest:g}, fp16 (which int8 goes through) ends at {FP16_MAX:g}. "
                f"Set quantize.{key}=bf16."
            )


def load(weights: Weights, settings: "Quantize", device: torch.device) -> PreTrainedModel:
    """Load and quantize tensor by tensor, so that memory holds little but the result.

    `load_model` would save this machine's settings; `from_pretrained(folder)` releases what it has
    read only at the end.
    """
    base = weights.folder
    with reading(base / "config.json", "Repair it, or choose another model."):
        config = without_mxfp4(AutoConfig.from_pretrained(base, trust_remote_code=False))
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    with loading_bar(f"into {settings.precision}"), reading(base):
        return load_strictly(
            weights,
            type(empty),
            config=empty.config,
            state_dict=weights.lazy_tensors(),
            dtype=DTYPES[settings.dense_dtype],
            device_map={"": device},
            quantization_config=quantization_config(settings),
        )


def quantization_config(settings: "Quantize") -> BitsAndBytesConfig | None:
    """Bitsandbytes' configuration; None for a dense precision."""
    if settings.is_four_bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.precision,
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=DTYPES[settings.compute_dtype],
        )
    return BitsAndBytesConfig(load_in_8bit=True) if settings.precision == "int8" else None


@contextmanager
def loading_bar(desc: str) -> Iterator[None]:
    """Replaces transformers' progress bar; trims the heap between tensors."""
    previous = set_tqdm_hook(lambda _, args, __: heap.each(args[0], desc, "tensor"))
    try:
        yield
    finally:
        set_tqdm_hook(previous)


def save(model: PreTrainedModel, base: Path, target: Path) -> None:
    """Write config and weights, and copy the base's generation config."""
    # transformers refuses to save some that it loads, well-known models' included.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(target, max_shard_size=SHARD_BYTES)
    generation = base / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, target / generation.name)


def describe(model: PreTrainedModel, weights: Weights, device: torch.device) -> Base:
    """Base weights, with the names that a loaded model gives them."""
    head = model.get_output_embeddings()
    embeddings, transposed = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            embeddings[f"{name}.weight"] = module.weight
        if Conv1D in (type(module), getattr(module, "source_cls", None)):
            transposed.add(f"{name}.weight")
    # By their saved names: GPT-NeoX saves its head under another name.
    as_saved = frozenset(revert_weight_conversion(model, embeddings))
    return Base(weights, device, as_saved, frozenset(transposed), model.base_model_prefix)


def linear_matrices(parameters: Iterable[Stored], embeddings: frozenset[str]) -> list[Stored]:
    """Weights of linear layers and experts, without embedding and head."""
    return [p for p in parameters if len(p.shape) > 1 and p.name not in embeddings]


def require_expected_bits(matrices: Sequence[Stored], settings: "Quantize") -> None:
    """Raise a UserError that names the worst matrix, unless the files have the expected size."""

    def expected(matrix: Stored) -> int:
        return stored_bytes(matrix.shape, settings.precision, settings.double_quant)

    tables = TABLE_BYTES + NESTED_TABLE_BYTES * settings.double_quant
    nominal, written = sum(map(expected, matrices)), sum(m.bytes for m in matrices)
    allowed = tables * len(matrices) * settings.is_four_bit + TOLERANCE * nominal
    if abs(written - nominal) <= allowed:
        return
    worst = max(matrices, key=lambda m: abs(m.bytes - expected(m)))
    count = sum(m.parameters for m in matrices)
    share = sum(m.parameters for m in matrices if m.kind != settings.precision) / count
    raise UserError(
        f"quantize.precision is {settings.precision}, {8 * nominal / count:.2f} bits a "
        f"parameter, but {8 * written / count:.2f} were written: {worst.name} is {worst.kind}, as "
        f"are {share:.0%} of the linear parameters (bitsandbytes quantizes plain nn.Linear alone). "
        "Set quantize.precision=bf16, or choose another model."
    )
