"""Weights as they lie in safetensors files: what each tensor takes, and its values one at a time.

bitsandbytes stores a quantized matrix as several tensors: the packed weight and, beside it, what
turns it back into numbers. Here they are put together again.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.shared.bnb import QuantState, dequantize_4bit, int8_vectorwise_dequant

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_STATE = "quant_state.bitsandbytes__"
_PART_OF_4BIT = re.compile(
    rf"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|{_STATE}(?:nf4|fp4))"
)
_PART_OF_INT8 = re.compile(r"(.+)\.(SCB|weight_format)")


@dataclass(frozen=True)
class Stored:
    """A parameter of the model.

    Attributes:
        name: of its weight in the file.
        shape: of the numbers it stands for, packed or not.
        kind: fp32, bf16, fp16, int8, fp4, nf4; or a dtype of safetensors that is none of them.
        bytes: in the file, all its tensors together.
        parts: the names of the tensors beside the weight, by what they are (`absmax`, `SCB`, …).
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    bytes: int
    parts: dict[str, str]

    @property
    def parameters(self) -> int:
        """How many numbers it stands for."""
        return prod(self.shape)


class Weights:
    """All *.safetensors of a folder. Nothing is read but headers until a tensor is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(folder.glob("*.safetensors"))
        self._headers: dict[str, dict[str, Any]] = {}
        self._paths: dict[str, Path] = {}
        self._starts: dict[Path, int] = {}
        for path in self.files:
            header, self._starts[path] = read_header(path)
            self._headers |= header
            self._paths |= dict.fromkeys(header, path)

    @property
    def bytes(self) -> int:
        """The size of the files."""
        return sum(path.stat().st_size for path in self.files)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, as it is stored: a view of the file, out of memory when it is let go.

        Not read by safetensors, whose views keep all that was read of a file in memory until the
        last of them is gone.
        """
        header, path = self._headers[name], self._paths[name]
        begin, end = header["data_offsets"]
        if begin == end:
            return torch.empty(header["shape"], dtype=_DTYPES[header["dtype"]])
        # "c", copy on write: nothing reaches the file, and torch does not warn of read-only memory.
        view = np.memmap(path, np.uint8, "c", self._starts[path] + begin, (end - begin,))
        return torch.from_numpy(view).view(_DTYPES[header["dtype"]]).view(header["shape"])

    def unread(self) -> dict[str, "Unread"]:
        """All tensors, each to be read when its turn comes."""
        return {name: Unread(self, name) for name in self._headers}

    def find(self, name: str, prefix: str) -> str | None:
        """The name under which a parameter lies here.

        A checkpoint of a model without its head leaves out the prefix that all but the head share.
        """
        names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        return next((n for n in names if n in self._headers), None)

    @cached_property
    def parameters(self) -> list[Stored]:
        """All parameters, in the order of the layers."""
        parts: dict[str, dict[str, str]] = {}
        for name in self._headers:
            owner, part = _owner(name)
            group = parts.setdefault(owner, {})
            if part:
                group[part] = name
        return [self._stored(name, parts[name]) for name in sorted(parts, key=_natural)]

    def _stored(self, name: str, parts: dict[str, str]) -> Stored:
        header = self._headers[name]
        shape = tuple(header["shape"])
        kind = DTYPE_NAMES.get(header["dtype"], header["dtype"])
        if "SCB" in parts:
            kind = "int8"
        for part, tensor in parts.items():
            if part.startswith(_STATE):
                kind = part.removeprefix(_STATE)
                shape = tuple(json.loads(bytes(self.tensor(tensor).tolist()))["shape"])
        size = sum(self._bytes(tensor) for tensor in [name, *parts.values()])
        return Stored(name, shape, kind, size, parts)

    def _bytes(self, name: str) -> int:
        begin, end = self._headers[name]["data_offsets"]
        return end - begin

    def values(self, stored: Stored, device: torch.device) -> torch.Tensor:
        """The numbers that a forward pass multiplies with: fp32 of `stored.shape`."""
        weight = self.tensor(stored.name).to(device)
        parts = {part: self.tensor(name).to(device) for part, name in stored.parts.items()}
        if stored.kind == "int8":
            weight = int8_vectorwise_dequant(weight, parts["SCB"])
        elif parts:
            weight = dequantize_4bit(weight, QuantState.from_dict(parts, device))
        return weight.float()


@dataclass(frozen=True)
class Unread:
    """A tensor that transformers reads, by `[...]`, when it puts it into a model."""

    weights: Weights
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.weights.tensor(self.name)[index]


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header of a safetensors file, and the byte at which the data begins.

    The format is eight bytes, the header's length, little-endian; then the header, JSON; then the
    data (https://huggingface.co/docs/safetensors#format).

    Returns:
        `dtype`, `shape` and `data_offsets` (bytes, from where the data begins) of each tensor.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: value for name, value in header.items() if name != "__metadata__"}, 8 + length


def _owner(name: str) -> tuple[str, str | None]:
    """The weight that a tensor belongs to, and what it is to it; a tensor of its own: (name, None).

    The constants of int8 lie beside the weight (`q_proj.SCB`), those of 4-bit types below it
    (`q_proj.weight.absmax`).
    """
    if found := _PART_OF_4BIT.fullmatch(name):
        return found[1], found[2]
    if found := _PART_OF_INT8.fullmatch(name):
        return f"{found[1]}.weight", found[2]
    return name, None


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key with layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
