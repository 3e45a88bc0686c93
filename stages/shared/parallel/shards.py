"""Shards: of each block's frozen weights a process keeps its part; all are gathered for a pass.

A frozen weight needs neither a gradient nor an optimizer's state, so that nothing else of a fully
sharded training (ZeRO-3, FSDP) is needed: bytes are divided, whatever they mean, and gathered block
by block into two buffers that the weights are views of. While a block computes, the next one is
gathered. The adapter, embedding, head and last norm are whole on each device.

Every process must run the same passes in the same order (`packing.even_passes`).

Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 5 (stage 3, parameters).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import distributed, nn

from stages.shared.model.loading import without_adapter
from stages.shared.weights.bnb import Params4bit

ALIGNMENT = 256  # bytes: of what a kernel may read at once


@dataclass(frozen=True)
class _Place:
    """A tensor within a block's bytes: a parameter of a module, or its `absmax`."""

    module: nn.Module
    name: str
    is_absmax: bool
    offset: int
    size: int
    dtype: torch.dtype
    shape: torch.Size

    def get(self) -> torch.Tensor:
        """The tensor itself: it is not held here, or a block would not be let go."""
        parameter: Any = getattr(self.module, self.name)
        tensor = parameter.quant_state.absmax if self.is_absmax else parameter.data
        return cast(torch.Tensor, tensor)

    def put(self, tensor: torch.Tensor) -> None:
        """Replace it; `Module.to` makes other parameters of quantized ones."""
        parameter: Any = getattr(self.module, self.name)
        if self.is_absmax:
            parameter.quant_state.absmax = tensor
        else:
            parameter.data = tensor


class Shards:
    """The frozen weights of a decoder's blocks, divided among the processes of a group."""

    def __init__(self, model: nn.Module, rank: int, size: int, device: torch.device) -> None:
        """Keep this process's part, on `device`; what is not sharded moves there too.

        At the most, its part and one block are in memory at once: a model that was loaded on the
        CPU lies in its files until then.
        """
        plain: Any = without_adapter(model)
        blocks = plain.get_decoder().layers
        self._size, self._shards, layouts = size, [], []
        for block in blocks:
            layout = list(_places(block))
            share = _aligned(-(-(layout[-1].offset + layout[-1].size) // size))
            whole = torch.zeros(share * size, dtype=torch.uint8)
            for place in layout:
                whole[place.offset :][: place.size] = _bytes(place.get())
                place.put(torch.empty(0, dtype=place.dtype, device=device))
            self._shards.append(whole[share * rank :][:share].to(device, copy=True))
            layouts.append(layout)
        model.to(device)
        largest = max(map(len, self._shards)) * size
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self._held: list[int | None] = [None, None]  # the block in each buffer
        self._pending: list[Any] = [None, None]
        for index, (block, layout) in enumerate(zip(blocks, layouts, strict=True)):
            for place in layout:
                part = self._buffers[index % 2][place.offset :][: place.size]
                place.put(part.view(place.dtype).view(place.shape))
            self._follow(block, index)

    @property
    def bytes(self) -> int:
        """Of this process's part and of the buffers."""
        return sum(x.nbytes for x in (*self._shards, *self._buffers))

    def _follow(self, block: nn.Module, index: int) -> None:
        """Gather before the block's forward pass, and before its backward pass."""

        def before_forward(*_: Any) -> None:
            in_backward = torch._C._current_graph_task_id() != -1  # recomputed
            self._gather(index, -1 if in_backward else 1)

        def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if first.requires_grad:
                first.register_hook(lambda _: self._gather(index, -1))

        block.register_forward_pre_hook(before_forward)
        block.register_forward_hook(after_forward)

    def _gather(self, index: int, step: int) -> None:
        """Have a block's weights in their buffer, and begin with those of the next."""
        self._start(index)
        pending, self._pending[index % 2] = self._pending[index % 2], None
        if pending:
            pending.wait()
        if 0 <= index + step < len(self._shards):
            self._start(index + step)

    def _start(self, index: int) -> None:
        slot, shard = index % 2, self._shards[index]
        if self._held[slot] != index:
            whole = self._buffers[slot][: len(shard) * self._size]
            self._pending[slot] = distributed.all_gather_single(whole, shard, async_op=True)
            self._held[slot] = index


def _places(block: nn.Module) -> Iterator[_Place]:
    """Frozen parameters of a block, and the largest constants of quantized ones."""
    offset = 0
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parts = [parameter.data] if not parameter.requires_grad else []
            if isinstance(parameter, Params4bit):
                parts.append(parameter.quant_state.absmax)
            for index, part in enumerate(parts):
                yield _Place(module, name, bool(index), offset, part.nbytes, part.dtype, part.shape)
                offset += _aligned(part.nbytes)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
