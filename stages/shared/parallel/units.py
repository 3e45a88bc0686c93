"""Units: matrices that are divided among processes and gathered together, as one run of bytes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import distributed, nn

from stages.shared.parallel.group import peers
from stages.shared.weights.bnb import Int8Params, Linear8bitLt, Params4bit

# An 8-bit optimizer keeps a constant for a block of weights, and fp32 states of small tensors: a
# matrix begins with a block, and neither it nor a process's part is small.
BLOCK, SMALLEST = 256, 4096  # fp32 weights


@dataclass(frozen=True)
class View:
    """A tensor within a unit's bytes: a parameter of a module, or its `absmax`."""

    module: nn.Module
    name: str
    is_absmax: bool
    offset: int  # in bytes
    dtype: torch.dtype
    shape: torch.Size

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.offset + self.shape.numel() * self.dtype.itemsize

    @property
    def parameter(self) -> Any:
        """Not held here: `Module.to` makes other parameters of quantized ones."""
        return getattr(self.module, self.name)

    def read(self) -> torch.Tensor:
        """The tensor, in the unit's dtype."""
        p = self.parameter
        tensor = p.quant_state.absmax if self.is_absmax else p.data
        return cast(torch.Tensor, tensor.to(self.dtype))

    def assign(self, tensor: torch.Tensor) -> None:
        """Replace it."""
        p = self.parameter
        if self.is_absmax:
            p.quant_state.absmax = tensor
        else:
            p.data = tensor
        if isinstance(p, Int8Params):  # the layer computes with the state's
            p.CB, cast(Any, self.module).state.CB = None, tensor

    def positions(self, each: int) -> range:
        """Of a master's values in its unit, where a value belongs to `each` weights."""
        start = self.offset // 4 // each
        return range(start, start - (-self.shape.numel() // each))


@dataclass(eq=False)
class Unit:
    """Matrices of a block, the embedding or the head.

    Attributes:
        layout: views of all their bytes.
        size: bytes of all parts, each as large as the others.
        shard: this process's part of the bytes, uint8.
        trained: of masters, the same as a parameter, fp32 [weights, 1].
    """

    layout: list[View]
    size: int = 0
    shard: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    trained: nn.Parameter | None = None

    def divide(self, module: nn.Module, rank: int, size: int, device: torch.device) -> None:
        """Keep a part on the device, and empty the matrices."""
        for layer in module.modules():
            if isinstance(layer, Linear8bitLt) and layer.weight.CB is not None:
                layer.init_8bit_state()
        share = _align(-(-_end(self.layout) // size), 4 * SMALLEST)
        self.size = share * size
        whole = torch.zeros(self.size, dtype=torch.uint8)
        for view in self.layout:
            whole[view.offset : view.end] = as_bytes(view.read())
        self.shard = whole[share * rank :][:share].to(device, copy=True)
        for view in self.layout:
            view.assign(self.shard.new_empty(0).view(view.dtype))

    def assign(self, whole: torch.Tensor, dtype: torch.dtype | None) -> None:
        """Make the matrices views of gathered bytes; masters are in `dtype` there."""
        for view in self.layout:
            stored = dtype or view.dtype
            start = view.offset // view.dtype.itemsize * stored.itemsize
            part = whole[start:][: view.shape.numel() * stored.itemsize]
            view.assign(part.view(stored).view(view.shape))


class Buffer:
    """Bytes that one unit at a time is gathered into; their storage is empty while unused.

    Attributes:
        bytes: uint8, as many as the largest unit has.
        unit: the one that is gathered, or begins to be.
    """

    def __init__(self, units: Iterable[Unit], device: torch.device) -> None:
        size = max((unit.size for unit in units), default=0)
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.unit: Unit | None = None
        self._pending: Any = None
        self.release()

    def allocate(self, size: int | None = None) -> torch.Tensor:
        """Give the storage so many bytes, or its own; returns those that it has."""
        size = len(self.bytes) if size is None else size
        storage = self.bytes.untyped_storage()
        if storage.nbytes() != size:  # to the same size it would copy
            storage.resize_(0)
            storage.resize_(size)
        return self.bytes[:size]

    def gather(self, unit: Unit) -> None:
        """Begin to gather a unit, unless it is here."""
        if self.unit is not unit and unit.layout:
            self.wait()
            whole = self.allocate()[: unit.size]
            with peers():
                self._pending = distributed.all_gather_single(whole, unit.shard, async_op=True)
            self.unit = unit

    def wait(self) -> None:
        """Until what was begun is gathered."""
        pending, self._pending = self._pending, None
        if pending:
            with peers():
                pending.wait()

    def release(self) -> None:
        """Free the storage; views of it stay what they are."""
        self.wait()
        self.unit = None
        self.allocate(0)


def lay_out(module: nn.Module, every: bool, dtype: torch.dtype | None = None) -> list[View]:
    """Views of a module's matrices, and of the constants of those in 4 bits.

    `every`: not the frozen ones alone; `dtype` of masters.
    """
    layout: list[View] = []
    for layer in module.modules():
        for name, p in layer.named_parameters(recurse=False):
            if p.ndim < 2 or p.numel() < SMALLEST or (p.requires_grad and not every):
                continue
            parts = [p.data, *([p.quant_state.absmax] if isinstance(p, Params4bit) else [])]
            for index, part in enumerate(parts):
                offset = _align(_end(layout), 4 * BLOCK)
                layout.append(
                    View(layer, name, bool(index), offset, dtype or part.dtype, part.shape)
                )
    return layout


def unit_bytes(module: nn.Module, every: bool) -> int:
    """Bytes of a module that are divided, as by `lay_out`."""
    return _end(lay_out(module, every))


def is_tied(plain: Any, every: bool) -> bool:
    """Whether embedding and head are one divided matrix."""
    ends = (plain.get_input_embeddings(), plain.get_output_embeddings())
    matrices = [{view.parameter for view in lay_out(end, every)} for end in ends]
    return not matrices[0].isdisjoint(matrices[1])


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 [size]."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _end(layout: list[View]) -> int:
    return layout[-1].end if layout else 0


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
