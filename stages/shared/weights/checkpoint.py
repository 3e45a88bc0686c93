"""safetensors checkpoints: lazy reading, and strict loading through transformers.

bitsandbytes stores a quantized matrix as several tensors: the packed weight and its constants.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are loaded from folders only

from stages.shared.weights import bnb  # before transformers and peft import bitsandbytes

# isort: split
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, core_model_loading
from transformers.core_model_loading import dot_natural_key
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import logging as transformers_logging

from stages.shared.core import files
from stages.shared.core.errors import UserError, lacks_memory
from stages.shared.weights import experts

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

DTYPE_NAMES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_STATE = "quant_state.bitsandbytes__"
_CONSTANT = re.compile(
    rf"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|{_STATE}(?:nf4|fp4)|SCB|weight_format)"
)
# Causal masks in old checkpoints, and the scalar they mask with.
_MASKS = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$")
REMEDY = "Write the folder again (dvc repro), or repair the model it came from."


@dataclass(frozen=True)
class Stored:
    """A parameter in its file."""

    name: str
    shape: tuple[int, ...]  # of the dequantized weight
    kind: str  # fp32, bf16, fp16, int8, fp4, nf4, or another dtype of safetensors
    bytes: int  # including the constants
    parts: dict[str, str]  # tensor names of a quantized matrix's constants, by `absmax`, `SCB`, …

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class Header(NamedTuple):
    """Place of a tensor in its file."""

    path: Path
    dtype: str  # of safetensors
    shape: tuple[int, ...]
    start: int  # byte in the file
    bytes: int


class Weights:
    """All *.safetensors of a folder, of which only headers are read until a tensor is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:  # transformers would look for pickles
            raise UserError(
                f"{folder}: has no *.safetensors, the only format of weights that is read. "
                "Convert the model, or run the stage that writes this folder."
            )
        files.require_json(folder)
        headers: dict[str, Header] = {}
        for path in self.files:
            headers |= read_header(path)
        # Experts' tensors one by one, as `experts.unfused` models have them.
        shapes = {name: header.shape for name, header in headers.items()}
        self.pieces = experts.pieces(_model_type(folder), shapes)
        fused = {piece.source for piece in self.pieces.values()}
        fused |= {name.replace("_blocks", "_scales") for name in fused}
        self._fused = {name: headers.pop(name) for name in fused & headers.keys()}
        for name, piece in self.pieces.items():
            path, dtype, *_ = self._fused[piece.source]
            dtype = "BF16" if dtype == "U8" else dtype
            headers[name] = Header(path, dtype, piece.shape, 0, _size(piece.shape, dtype))
        self._headers = headers

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.files)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, memory-mapped; its pages leave memory with it.

        safetensors' own views keep a file's pages in memory until the last view is released.
        """
        if piece := self.pieces.get(name):
            fused = self._of_expert(piece.source, piece.expert)
            return piece.split(fused)[piece.name].contiguous()
        header = self._headers.get(name) or self._fused[name]
        dtype = str_to_torch_dtype[header.dtype]
        if not header.bytes:
            return torch.empty(header.shape, dtype=dtype)
        # Copy on write ("c"): torch would warn of read-only memory.
        view = np.memmap(header.path, np.uint8, "c", header.start, (header.bytes,))
        return torch.from_numpy(view).view(dtype).view(header.shape)

    def _of_expert(self, source: str, expert: int) -> torch.Tensor:
        """An expert's part of a fused tensor, dequantized from MXFP4."""
        fused = self.tensor(source)[expert]
        if fused.dtype != torch.uint8:
            return fused
        scales = self.tensor(source.replace("_blocks", "_scales"))[expert]
        return convert_moe_packed_tensors(fused[None], scales[None])[0]

    def lazy_tensors(self) -> dict[str, "LazyTensor"]:
        """All tensors, read on access."""
        return {name: LazyTensor(self, name) for name in self._headers}

    def find(self, name: str, prefix: str) -> str | None:
        """Stored name of a parameter; a model saved without its head lacks the prefix."""
        names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        return next((n for n in names if n in self._headers), None)

    @cached_property
    def parameters(self) -> list[Stored]:
        """All parameters in the order of the layers; checks the constants of quantized ones."""
        groups: dict[str, dict[str, str]] = {}
        for name in self._headers:
            owner, part = _owner(name)
            group = groups.setdefault(owner, {})
            if part:
                group[part] = name
        return [self._stored(name, groups[name]) for name in sorted(groups, key=dot_natural_key)]

    def _stored(self, name: str, parts: dict[str, str]) -> Stored:
        if name not in self._headers:
            raise self.error(name, "is missing, but its constants are there")
        header, sizes = self._headers[name], dict[str, int]()  # elements of each constant
        kind, shape = DTYPE_NAMES.get(header.dtype, header.dtype), header.shape
        if "SCB" in parts or "weight_format" in parts:
            kind, sizes = "int8", {"SCB": prod(shape[:-1]), "weight_format": 1}
        elif parts:
            kind, shape, sizes = self._four_bit(name, parts)
        for part, size in sizes.items():
            if part not in parts:
                raise self.error(name, f"lacks its {part}")
            if prod(self._headers[parts[part]].shape) != size:
                raise self.error(parts[part], f"has the wrong shape, not {size} elements")
        size = sum(self._headers[tensor].bytes for tensor in [name, *parts.values()])
        return Stored(name, shape, kind, size, parts)

    def _four_bit(
        self, name: str, parts: Mapping[str, str]
    ) -> tuple[str, tuple[int, ...], dict[str, int]]:
        """Type and shape of a 4-bit matrix, and the size of each constant, by its state in JSON."""
        key = next((part for part in parts if part.startswith(_STATE)), None)
        if key is None:
            raise self.error(name, "lacks its quant_state")
        try:
            state = json.loads(bytes(self.tensor(parts[key]).tolist()))
            shape = tuple(state["shape"])
            blocks, nested = ceil(prod(shape) / state["blocksize"]), state.get("nested_blocksize")
            sizes = {"absmax": blocks, "quant_map": 16}
            if nested:
                sizes |= {"nested_absmax": ceil(blocks / nested), "nested_quant_map": 256}
            if self._headers[name].bytes != ceil(prod(shape) / 2):
                raise self.error(name, f"has the wrong shape for 4-bit {shape}")
        except (ValueError, KeyError, TypeError, ArithmeticError):
            raise self.error(parts[key], "is damaged") from None
        return key.removeprefix(_STATE), shape, sizes

    def error(self, name: str, fault: str) -> UserError:
        """An error that names the tensor and its file (or, if it has none, the folder)."""
        path = self.files[0] if len(self.files) == 1 else self.folder
        if known := self._headers.get(name) or self._fused.get(name):
            path = known.path
        return UserError(f"{path}: {name} {fault}. {REMEDY}")

    def values(self, stored: Stored, device: torch.device) -> torch.Tensor:
        """Dequantized weight, fp32 of `stored.shape`."""
        weight = self.tensor(stored.name).to(device)
        parts = {part: self.tensor(name).to(device) for part, name in stored.parts.items()}
        if stored.kind == "int8":
            weight = bnb.int8_vectorwise_dequant(weight, parts["SCB"])
        elif parts:
            weight = bnb.dequantize_4bit(weight, bnb.QuantState.from_dict(parts, device))
        return weight.float()


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that transformers reads by `[...]` when it is loaded."""

    weights: Weights
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.weights.tensor(self.name)[index]


def load_strictly(weights: Weights, loader: Any, **options: Any) -> PreTrainedModel:
    """`loader.from_pretrained`, where every weight comes from the files and is finite.

    transformers initializes missing weights at random and ignores unknown ones. Here both raise a
    UserError, as do wrong shapes. Experts are unfused where they can be.
    """
    if not weights.parameters:  # also checks the constants of quantized matrices
        raise weights.error("*", "are no tensors")
    source = None if "state_dict" in options else weights.folder
    options |= {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    options |= {"ignore_mismatched_sizes": True}  # they are in the info, without an error
    config = options.get("config") or AutoConfig.from_pretrained(source, trust_remote_code=False)
    if weights.pieces:
        options |= {"config": without_mxfp4(config), "state_dict": weights.lazy_tensors()}
        source, loader = None, experts.model_class(config)  # without a folder no Auto class loads
    with experts.unfused(config), _named_errors(weights):
        model, info = loader.from_pretrained(source, **options)
    tied = getattr(model, "all_tied_weights_keys", {})  # absent if both are
    info["missing_keys"] = info["missing_keys"] - tied.keys() or info["missing_keys"]
    _require_exact(weights, info)
    for name, layer in bnb.quantized_layers(model).items():
        state = getattr(layer.weight, "quant_state", None)
        shape = layer.weight.shape if isinstance(layer, bnb.Linear8bitLt) else state and state.shape
        if shape != (layer.out_features, layer.in_features):
            raise weights.error(f"{name}.weight", "does not fit the sizes in config.json")
    require_finite(model.state_dict(), weights)
    return model


def without_mxfp4(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a model whose MXFP4 experts are dequantized as they are read."""
    quantization = getattr(config, "quantization_config", None) or {}
    if quantization.get("quant_method") == "mxfp4":
        del config.quantization_config
    return config


@contextmanager
def _named_errors(weights: Weights) -> Iterator[None]:
    """Context in which an error of transformers' conversions is raised, and names the tensor.

    It would be logged, and the tensor be missing.
    """

    @contextmanager
    def raised(name: str, *_: Any, **__: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if lacks_memory(error):
                raise
            fault = "cannot be assembled from the stored tensors"
            raise weights.error(name, fault) from error

    with patch.object(core_model_loading, "log_conversion_errors", raised):
        yield


def _require_exact(weights: Weights, info: Mapping[str, Any]) -> None:
    for name, stored, expected in sorted(info["mismatched_keys"]):
        fault = f"has shape {list(stored)}, but config.json makes it {list(expected)}"
        raise weights.error(name, fault)
    unexpected = {name for name in info["unexpected_keys"] if not _MASKS.search(name)}
    missing = info["missing_keys"]
    for fault, names in (("is missing", missing), ("is no weight of this model", unexpected)):
        if names:
            others = f" (and {len(names) - 1} others)" if len(names) > 1 else ""
            raise weights.error(min(names), fault + others)


def require_finite(tensors: Mapping[str, torch.Tensor], weights: Weights) -> None:
    """Raise a UserError for the first tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        # A tenth of the time of `isfinite`: 6 ms for 10⁸ elements in bf16.
        extremes = tensor.aminmax() if tensor.is_floating_point() and tensor.numel() else ()
        if not all(extreme.isfinite() for extreme in extremes):
            raise weights.error(name, "holds NaN or infinity")


def read_header(path: Path) -> dict[str, Header]:
    """Header of a file by tensor; a damaged file raises a UserError.

    The header's length (8 bytes, little-endian), the header (JSON), the data:
    https://huggingface.co/docs/safetensors#format.
    """
    try:
        with safe_open(path, "np"), path.open("rb") as file:  # the tensors fill the whole file
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
        tensors = {}
        for name in sorted(header.keys() - {"__metadata__"}):
            dtype, shape, (begin, _) = map(header[name].get, ("dtype", "shape", "data_offsets"))
            tensors[name] = Header(path, dtype, tuple(shape), start + begin, _size(shape, dtype))
        return tensors
    except (SafetensorError, KeyError):  # or a dtype that torch lacks
        raise UserError(f"{path}: is no whole safetensors file. {REMEDY}") from None


def _size(shape: Sequence[int], dtype: str) -> int:
    return prod(shape) * str_to_torch_dtype[dtype].itemsize


def _model_type(folder: Path) -> str:
    """Architecture of the text model; empty without a config, which loading reports."""
    path = folder / "config.json"
    config = files.read_json(path) if path.exists() else {}
    text = config.get("text_config")
    return str((text if isinstance(text, dict) else config).get("model_type"))


def _owner(name: str) -> tuple[str, str | None]:
    """Parameter of a tensor, and which constant it is, as in `q_proj.weight.absmax`."""
    if match := _CONSTANT.fullmatch(name):
        return f"{match[1].removesuffix('.weight')}.weight", match[2]
    return name, None
