"""Shards: of a model's matrices a process keeps its part; all are gathered for a pass.

Frozen weights need neither gradient nor optimizer: bytes are divided, whatever they mean. In full
fine-tuning the parts are trained: fp32 masters, whose gradients are summed and scattered after each
block's backward pass, and which are updated where they lie (ZeRO-3). Blocks are gathered into two
buffers that their weights are views of, the next one while one computes: NCCL does so on its own
stream. Embedding and head are gathered when they are used, in place of these buffers. An adapter,
norms and biases are whole on each device.

Every process must run the same passes in the same order (`packing.even_passes`).

Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 5 (stage 3).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import distributed, nn

from stages.shared.model.loading import blocks_of, without_adapter
from stages.shared.parallel.group import Group, peers
from stages.shared.parallel.units import BLOCK, Unit, as_bytes, is_tied, lay_out
from stages.shared.weights.bnb import Linear8bitLt

OF_ALL = {"step", "qmap1", "qmap2"}  # states of an optimizer that belong to no weight


class Shards:
    """The matrices of a model, divided among the processes of a group.

    Attributes:
        units: what is gathered together.
        matrices: parameters of the model that are divided.
        trained: this process's parts of them in full fine-tuning, fp32 [weights, 1].
        buffers: of gathered weights and gradients; their storage is empty while unused.
    """

    def __init__(
        self, model: nn.Module, group: Group, device: torch.device, *, trained: bool = False
    ) -> None:
        """Keep this process's part, on `device`; what is whole moves there too.

        At the most, its part and one block are in memory at once: a model that was loaded on the
        CPU lies in its files until then. `trained`: in full fine-tuning, as fp32 masters.
        """
        plain: Any = without_adapter(model)
        self._rank, self._size, self._device = group.rank, group.size, device
        self._dtype, every = torch.float32 if trained else None, not isinstance(model, PeftModel)
        modules = [*blocks_of(plain), plain.get_input_embeddings(), plain.get_output_embeddings()]
        of_all = [Unit(lay_out(module, every, self._dtype)) for module in modules]
        if is_tied(plain, every):
            of_all[-1] = of_all[-2]
        for module, unit in dict(zip(modules, of_all, strict=True)).items():
            if not len(unit.shard):
                unit.divide(module, group.rank, group.size, device)
        nn.Module.to(model, device)  # transformers' own refuses quantized ones
        for layer in model.modules():
            if isinstance(layer, Linear8bitLt) and layer.state.SCB is not None:
                layer.state.SCB = layer.state.SCB.to(device)
        self.units = [unit for unit in dict.fromkeys(of_all) if unit.layout]
        self.matrices = {view.parameter: (one, view) for one in self.units for view in one.layout}
        for unit in self.units if trained else ():
            unit.trained = nn.Parameter(unit.shard.view(torch.float32)[:, None])
        self.trained = [unit.trained for unit in self.units if unit.trained is not None]
        for p in model.parameters() if trained else ():
            p.data = p.data.float()  # masters of what is whole

        *self._blocks, embedding, head = of_all
        self._ends = {end: self._buffer([end]) for end in (embedding, head)}
        self._slots = [self._buffer(self._blocks) for _ in range(2)]
        self._gradients = self._buffer(self.units if trained else [])
        self.buffers = [*self._slots, *self._ends.values(), self._gradients]
        self._held: list[int | None] = [None, None]  # the block in each slot
        self._pending: list[Any] = [None, None]
        self._open: Unit | None = None  # the end that is gathered
        self._returning: Unit | None = None  # through which the backward pass goes
        self._assign(self._dtype)
        for index, block in enumerate(modules[:-2]):
            self._follow(block, index)
        modules[-2].register_forward_pre_hook(lambda *_: self._gather_end(embedding))
        # The fused loss reads the head's weight, and calls no module.
        plain.get_decoder().register_forward_hook(lambda *_: self._gather_end(head))
        for module, unit in zip(modules[-2:], (embedding, head), strict=True):
            module.register_forward_hook(_before_backward(partial(self._return_through, unit)))

    def _buffer(self, units: Sequence[Unit]) -> torch.Tensor:
        """Bytes of the largest unit, without storage."""
        size = max((len(unit.shard) for unit in units), default=0) * self._size
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        _resize(buffer, 0)
        return buffer

    def _assign(self, dtype: torch.dtype | None) -> None:
        """Make all matrices views of the buffers, which hold nothing yet; masters in `dtype`."""
        self._dtype = dtype
        for unit, buffer in self._ends.items():
            unit.assign(_resize(buffer), dtype)
        for index, unit in enumerate(self._blocks):
            unit.assign(_resize(self._slots[index % 2]), dtype)
        self._release()  # views of a buffer stay what they are

    # ---------------------------------------------------------------------------------- weights

    def _follow(self, block: nn.Module, index: int) -> None:
        """Gather before the block's forward pass, and before its backward pass."""

        def before_forward(*_: Any) -> None:
            in_backward = torch._C._current_graph_task_id() != -1  # recomputed
            self._gather(index, -1 if in_backward else 1)

        def before_backward() -> None:
            self._return_through(self._blocks[index])
            self._gather(index, -1)

        block.register_forward_pre_hook(before_forward)
        block.register_forward_hook(_before_backward(before_backward))

    def _gather(self, index: int, step: int) -> None:
        """Have a block's weights in their buffer, and begin with those of the next."""
        self._release_end()
        self._start(index)
        self._wait(index % 2)
        if 0 <= index + step < len(self._blocks):
            self._start(index + step)

    def _start(self, index: int) -> None:
        slot, unit = index % 2, self._blocks[index]
        if self._held[slot] != index and unit.layout:
            self._wait(slot)
            self._pending[slot] = self._fill(self._slots[slot], unit)
            self._held[slot] = index

    def _fill(self, buffer: torch.Tensor, unit: Unit) -> Any:
        """Begin to gather a unit; returns what can be waited for."""
        whole = _resize(buffer)[: len(unit.shard) * self._size]
        with peers():
            return distributed.all_gather_single(whole, unit.shard, async_op=True)

    def _wait(self, slot: int) -> None:
        pending, self._pending[slot] = self._pending[slot], None
        if pending:
            with peers():
                pending.wait()

    def _gather_end(self, unit: Unit) -> None:
        """Have the embedding or the head whole, and no block, until a block computes."""
        if self._open is not unit and unit.layout:
            self._release()
            self._pending[0] = self._fill(self._ends[unit], unit)
            self._wait(0)
            self._open = unit

    def _release(self) -> None:
        """Free all that is gathered."""
        self._release_end()
        for slot, buffer in enumerate(self._slots):
            self._wait(slot)
            self._held[slot] = None
            _resize(buffer, 0)

    def _release_end(self) -> None:
        for buffer in self._ends.values():
            _resize(buffer, 0)
        self._open = None

    # --------------------------------------------------------------------------------- training

    def _return_through(self, unit: Unit) -> None:
        """Have the gradients of a unit's masters in one buffer; those of the last are scattered."""
        if unit.trained is None or self._returning is unit:
            return
        if self._returning is None:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._scatter)  # of the last one, after the pass
        self._scatter()
        whole = _resize(self._gradients, len(unit.shard) * self._size).zero_().view(torch.float32)
        for view in unit.layout:
            gradient = whole[view.offset // 4 :][: view.shape.numel()].view(view.shape)
            if view.parameter.grad is not None:  # a router's loss comes first
                gradient.copy_(view.parameter.grad)
            view.parameter.grad = gradient
        self._returning = unit

    def _scatter(self) -> None:
        """Sum the gradients of a unit over all processes; each keeps those of its part."""
        unit, self._returning = self._returning, None
        if unit is None or unit.trained is None:
            return
        for view in unit.layout:
            view.parameter.grad = None
        size = len(unit.shard) * self._size
        parts = self._gradients[:size].view(torch.float32).view(self._size, -1)
        with peers():
            if self._device.type == "cpu":  # gloo's reduce-scatter is that of a copy
                distributed.all_reduce(parts)
            else:
                distributed.reduce_scatter_single(parts[self._rank], parts)
        if unit.trained.grad is None:
            unit.trained.grad = torch.zeros_like(unit.trained)
        unit.trained.grad[:, 0] += parts[self._rank]
        _resize(self._gradients, 0)

    @contextmanager
    def as_saved(self, storage_dtype: torch.dtype, compute_dtype: torch.dtype) -> Iterator[None]:
        """As `masters.as_saved`, which passes over what needs no gradient meanwhile."""
        masters = [unit.shard for unit in self.units if self.trained]
        for unit, shard in zip(self.units, masters, strict=False):
            rounded = shard.view(torch.float32).to(storage_dtype).to(compute_dtype)
            unit.shard = rounded.view(torch.uint8)
        for matrix in self.matrices if self.trained else ():
            matrix.requires_grad_(False)
        self._assign(compute_dtype if self.trained else None)
        try:
            yield
        finally:
            for unit, shard in zip(self.units, masters, strict=False):
                unit.shard = shard
            self._assign(torch.float32 if self.trained else None)
            for matrix in self.matrices if self.trained else ():
                matrix.requires_grad_(True)

    def gather(
        self, states: Callable[[nn.Parameter], dict[str, Any]] = lambda _: {}
    ) -> Iterator[dict[nn.Parameter, dict[str, Any]]]:
        """The `weight` of trained matrices, whole on the CPU, for those of a unit at a time.

        And `states` of its part: `OF_ALL`, or a value for each weight or block of 256; flat.
        """
        for unit in self.units if self.trained else ():
            assert unit.trained is not None and self._dtype
            whole = {"weight": unit.shard.view(self._dtype), **states(unit.trained)}
            weights = unit.trained.numel() * self._size
            for name in whole.keys() - OF_ALL:
                own = as_bytes(whole[name]).to(self._device)
                every = own.new_empty(len(own) * self._size)
                with peers():
                    distributed.all_gather_single(every, own)
                whole[name] = every.cpu().view(whole[name].dtype)
            found: dict[nn.Parameter, dict[str, Any]] = {}
            for view in unit.layout:
                values = found[view.parameter] = deepcopy(
                    {n: whole[n] for n in whole if n in OF_ALL}
                )
                for name in whole.keys() - OF_ALL:
                    at = view.positions(weights // len(whole[name]))
                    values[name] = whole[name][at.start : at.stop].clone()
            yield found

    def keep(
        self, matrix: nn.Parameter, values: dict[str, Any], kept: dict[nn.Parameter, dict[str, Any]]
    ) -> None:
        """Copy what this process keeps of a matrix's tensors, as of `gather`, to its part's."""
        unit, view = self.matrices[matrix]
        assert unit.trained is not None
        own = kept.setdefault(unit.trained, {})
        for name, value in values.items():
            if name in OF_ALL:
                own[name] = value
                continue
            each = 1 if value.numel() == matrix.numel() else BLOCK
            count = unit.trained.numel() // each
            if name not in own:  # beyond matrices a code of zero
                zero = values[f"qmap{name[-1]}"].abs().argmin() if value.dtype == torch.uint8 else 0
                own[name] = value.new_full((count,), int(zero))
            start = view.positions(each).start - self._rank * count
            first, last = max(start, 0), min(start + value.numel(), count)
            if first < last:
                own[name][first:last] = value.flatten()[first - start : last - start]


def _before_backward(act: Callable[[], None]) -> Callable[..., None]:
    """Forward hook: `act` once the gradient of a module's output is there."""

    def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(lambda _: act())

    return after_forward


def _resize(buffer: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """Give a buffer's storage so many bytes, or its own; returns the part that has some."""
    size = buffer.nbytes if size is None else size
    storage = buffer.untyped_storage()
    if storage.nbytes() != size:  # to the same size it would copy
        storage.resize_(0)
        storage.resize_(size)
    return buffer[:size]
