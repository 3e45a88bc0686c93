"""Shards: of a model's frozen weights a process keeps its part; all are gathered for a pass.

A frozen weight needs neither a gradient nor an optimizer's state, so that nothing else of a fully
sharded training (ZeRO-3, FSDP) is needed: bytes are divided, whatever they mean. Blocks are
gathered into two buffers that their weights are views of, the next one while one computes: NCCL
does so on its own stream. Embedding and head are gathered when they are used, in place of these
buffers. The adapter and the last norm are whole on each device.

Every process must run the same passes in the same order (`packing.even_passes`).

Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 5 (stage 3, parameters).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import distributed, nn

from stages.shared.model.loading import blocks_of, without_adapter
from stages.shared.weights.bnb import Int8Params, Linear8bitLt, Params4bit

ALIGNMENT = 256  # bytes: of what a kernel may read at once


@dataclass(frozen=True)
class _Place:
    """A tensor within a unit's bytes: a parameter of a module, or its `absmax`."""

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
        if isinstance(parameter, Int8Params):  # the layer computes with the state's
            parameter.CB, cast(Any, self.module).state.CB = None, tensor


@dataclass
class _Unit:
    """Frozen tensors that are gathered together: a block's, the embedding's or the head's."""

    layout: list[_Place]
    shard: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def put(self, whole: torch.Tensor | None) -> None:
        """Make the tensors views of gathered bytes, or empty."""
        for place in self.layout:
            part = self.shard[:0] if whole is None else whole[place.offset :][: place.size]
            shape = (0,) if whole is None else place.shape
            place.put(part.view(place.dtype).view(shape))


class Shards:
    """The frozen weights of a model, divided among the processes of a group."""

    def __init__(self, model: nn.Module, rank: int, size: int, device: torch.device) -> None:
        """Keep this process's part, on `device`; unsharded weights move there too.

        At the most, its part and one block are in memory at once: a model that was loaded on the
        CPU lies in its files until then.
        """
        plain: Any = without_adapter(model)
        blocks = blocks_of(plain)
        embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
        self._size, self._rank, self._device = size, rank, device
        tied = is_tied(plain)
        self._blocks = [self._divide(block) for block in blocks]
        ends = [self._divide(embedding)]
        ends += [ends[0] if tied else self._divide(head)]
        nn.Module.to(model, device)  # transformers' own refuses quantized ones
        for layer in model.modules():
            if isinstance(layer, Linear8bitLt) and layer.state.SCB is not None:
                layer.state.SCB = layer.state.SCB.to(device)
        largest = max(len(block.shard) for block in self._blocks) * size
        self.buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self._held: list[int | None] = [None, None]  # the block in each buffer
        self._pending: list[Any] = [None, None]
        self._open: _Unit | None = None  # the end that is gathered
        for unit in ends:
            unit.put(None)
        for index, (block, unit) in enumerate(zip(blocks, self._blocks, strict=True)):
            unit.put(self.buffers[index % 2])
            self._follow(block, index)
        embedding.register_forward_pre_hook(lambda *_: self._gather_end(ends[0]))
        # The fused loss reads the head's weight, and calls no module.
        plain.get_decoder().register_forward_hook(lambda *_: self._gather_end(ends[1]))
        self._units = list({id(unit): unit for unit in (*self._blocks, *ends)}.values())

    @property
    def parts(self) -> list[torch.Tensor]:
        """What this process keeps: uint8."""
        return [unit.shard for unit in self._units]

    def _divide(self, module: nn.Module) -> _Unit:
        """Keep this process's part of a module's frozen bytes."""
        for layer in module.modules():
            if isinstance(layer, Linear8bitLt) and layer.weight.CB is not None:
                layer.init_8bit_state()
        unit = _Unit(list(_places(module)))
        share = _aligned(-(-_end(unit.layout) // self._size))
        whole = torch.zeros(share * self._size, dtype=torch.uint8)
        for place in unit.layout:
            whole[place.offset :][: place.size] = _bytes(place.get())
        unit.shard = whole[share * self._rank :][:share].to(self._device, copy=True)
        unit.put(None)
        return unit

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
        self._close_end()
        self._start(index)
        self._wait(index % 2)
        if 0 <= index + step < len(self._blocks):
            self._start(index + step)

    def _start(self, index: int) -> None:
        slot, shard = index % 2, self._blocks[index].shard
        if self._held[slot] != index:
            self._wait(slot)
            buffer = self.buffers[slot]
            if not buffer.untyped_storage().nbytes():  # resizing to the same size would copy
                buffer.untyped_storage().resize_(buffer.nbytes)
            whole = buffer[: len(shard) * self._size]
            self._pending[slot] = distributed.all_gather_single(whole, shard, async_op=True)
            self._held[slot] = index

    def _wait(self, slot: int) -> None:
        pending, self._pending[slot] = self._pending[slot], None
        if pending:
            pending.wait()

    def _gather_end(self, unit: _Unit) -> None:
        """Have the embedding or the head whole, and no block, until a block computes."""
        if self._open is unit or not unit.layout:
            return
        self._close_end()
        for slot, buffer in enumerate(self.buffers):
            self._wait(slot)
            self._held[slot] = None
            buffer.untyped_storage().resize_(0)  # views of it stay what they are
        with torch.inference_mode(False):  # weights may be saved for a backward pass
            whole = unit.shard.new_empty(len(unit.shard) * self._size)
            distributed.all_gather_single(whole, unit.shard)
            unit.put(whole)
        self._open = unit

    def _close_end(self) -> None:
        if self._open:
            self._open.put(None)
        self._open = None


def frozen_bytes(module: nn.Module) -> int:
    """Bytes of a module that are sharded, each tensor aligned."""
    return _end(list(_places(module)))


def is_tied(plain: Any) -> bool:
    """Whether embedding and head are one frozen matrix."""
    ends = (plain.get_input_embeddings(), plain.get_output_embeddings())
    frozen = [{p for p in end.parameters() if not p.requires_grad} for end in ends]
    return not frozen[0].isdisjoint(frozen[1])


def _places(module: nn.Module) -> Iterator[_Place]:
    """Frozen parameters, and the largest constants of those in 4 bits."""
    offset = 0
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            parts = [parameter.data] if not parameter.requires_grad else []
            if isinstance(parameter, Params4bit):
                parts.append(parameter.quant_state.absmax)
            for index, part in enumerate(parts):
                yield _Place(layer, name, bool(index), offset, part.nbytes, part.dtype, part.shape)
                offset += _aligned(part.nbytes)


def _end(layout: list[_Place]) -> int:
    return layout[-1].offset + layout[-1].size if layout else 0


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
