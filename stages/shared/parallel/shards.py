"""Sharded weights: each process keeps a part of all matrices, which are gathered for a pass.

Frozen weights need neither gradient nor optimizer: bytes are divided, whatever they mean. In full
fine-tuning the parts are trained: fp32 masters, whose gradients are summed and scattered after each
block's backward pass, and which are updated where they lie (ZeRO-3). Blocks are gathered into two
buffers that their weights are views of, the next one while one computes: NCCL does so on its own
stream. Embedding and head are gathered when they are used, in place of these buffers. An adapter,
norms and biases are whole on each device.

Every process must run the same passes in the same order (`packing.even_passes`).

Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 5 (stage 3).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import distributed, nn

from stages.shared.model.loading import blocks_of, without_adapter
from stages.shared.parallel.group import Group, peers
from stages.shared.parallel.units import BLOCK, Buffer, Unit, as_bytes, is_tied, lay_out
from stages.shared.weights.bnb import Linear8bitLt

OF_ALL = {"step", "qmap1", "qmap2"}  # states of an optimizer that belong to no weight


class Shards:
    """The matrices of a model, divided among the processes of a group.

    Attributes:
        units: blocks, embedding and head.
        matrices: the divided parameters, each with its unit and its view there.
        trained: this process's parts of them in full fine-tuning, fp32 [weights, 1].
        buffers: of gathered weights and gradients; their storage is empty while unused.
    """

    def __init__(
        self, model: nn.Module, group: Group, device: torch.device, *, trained: bool = False
    ) -> None:
        """Keep this process's part, on `device`, in full fine-tuning (`trained`) as fp32 masters.

        What is whole moves there too. A model on the CPU lies memory-mapped in its files until
        then: its part and one block are in memory at once.
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
        self._slots = [Buffer(self._blocks, device) for _ in range(2)]
        self._ends = {end: Buffer([end], device) for end in (embedding, head)}
        self._gathered = [*self._slots, *self._ends.values()]
        self._gradients = Buffer(self.units if trained else [], device)
        self.buffers = [buffer.bytes for buffer in (*self._gathered, self._gradients)]
        self._returning: Unit | None = None  # through which the backward pass goes
        self._assign(self._dtype)
        for index, block in enumerate(modules[:-2]):
            self._follow(block, index)
        modules[-2].register_forward_pre_hook(lambda *_: self._gather_end(embedding))
        # The fused loss reads the head's weight, and calls no module.
        plain.get_decoder().register_forward_hook(lambda *_: self._gather_end(head))
        for module, unit in zip(modules[-2:], (embedding, head), strict=True):
            module.register_forward_hook(_before_backward(partial(self._return_through, unit)))

    def _assign(self, dtype: torch.dtype | None) -> None:
        """Make all matrices views of the buffers, which hold nothing yet; masters in `dtype`."""
        self._dtype = dtype
        for unit, buffer in self._ends.items():
            unit.assign(buffer.allocate(), dtype)
        for index, unit in enumerate(self._blocks):
            unit.assign(self._slots[index % 2].allocate(), dtype)
        for buffer in self._gathered:
            buffer.release()

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
        """Gather a block's weights, and begin with those of the next."""
        for end in self._ends.values():
            end.release()
        slot, following = self._slots[index % 2], index + step
        slot.gather(self._blocks[index])
        slot.wait()
        if 0 <= following < len(self._blocks):
            self._slots[following % 2].gather(self._blocks[following])

    def _gather_end(self, unit: Unit) -> None:
        """Gather the embedding or the head, in place of the blocks."""
        end = self._ends[unit]
        if end.unit is not unit and unit.layout:
            for buffer in self._gathered:
                buffer.release()
            end.gather(unit)
            end.wait()

    # --------------------------------------------------------------------------------- training

    def _return_through(self, unit: Unit) -> None:
        """Collect the gradients of a unit's masters in one buffer; scatter those of the last."""
        if unit.trained is None or self._returning is unit:
            return
        if self._returning is None:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._scatter)  # of the last one, after the pass
        self._scatter()
        whole = self._gradients.allocate(unit.size).zero_().view(torch.float32)
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
        parts = self._gradients.bytes[: unit.size].view(torch.float32).view(self._size, -1)
        with peers():
            if self._device.type == "cpu":  # gloo's reduce-scatter is that of a copy
                distributed.all_reduce(parts)
            else:
                distributed.reduce_scatter_single(parts[self._rank], parts)
        if unit.trained.grad is None:
            unit.trained.grad = torch.zeros_like(unit.trained)
        unit.trained.grad[:, 0] += parts[self._rank]
        self._gradients.release()

    @contextmanager
    def as_saved(self, storage_dtype: torch.dtype, compute_dtype: torch.dtype) -> Iterator[None]:
        """As `adapter.as_saved`, which skips divided masters: they need no gradient meanwhile."""
        if not self.trained:
            yield
            return
        masters = [unit.shard for unit in self.units]
        for unit, shard in zip(self.units, masters, strict=True):
            rounded = shard.view(torch.float32).to(storage_dtype).to(compute_dtype)
            unit.shard = rounded.view(torch.uint8)
        for matrix in self.matrices:
            matrix.requires_grad_(False)
        self._assign(compute_dtype)
        try:
            yield
        finally:
            for unit, shard in zip(self.units, masters, strict=True):
                unit.shard = shard
            self._assign(torch.float32)
            for matrix in self.matrices:
                matrix.requires_grad_(True)

    def gather(
        self, states: Callable[[nn.Parameter], dict[str, Any]] = lambda _: {}
    ) -> Iterator[dict[nn.Parameter, dict[str, Any]]]:
        """Whole `weight` and `states` of trained matrices on the CPU, flat, a unit at a time.

        `states` of a part: `OF_ALL`, or a value for each weight or block of 256.
        """
        for unit in self.units if self.trained else ():
            assert unit.trained is not None and self._dtype
            whole = {"weight": unit.shard.view(self._dtype), **states(unit.trained)}
            for name in sorted(whole.keys() - OF_ALL):  # a set's order is each process's own
                own = as_bytes(whole[name]).to(self._device)
                every = own.new_empty(len(own) * self._size)
                with peers():
                    distributed.all_gather_single(every, own)
                whole[name] = every.cpu().view(whole[name].dtype)
            weights = unit.trained.numel() * self._size
            matrices: dict[nn.Parameter, dict[str, Any]] = {}
            for view in unit.layout:
                values = matrices[view.parameter] = {}
                for name, value in whole.items():
                    if name in OF_ALL:
                        values[name] = deepcopy(value)
                    else:
                        at = view.positions(weights // len(value))
                        values[name] = value[at.start : at.stop].clone()
            yield matrices

    def keep(
        self, matrix: nn.Parameter, values: dict[str, Any], kept: dict[nn.Parameter, dict[str, Any]]
    ) -> None:
        """Copy this process's part of a matrix's tensors, as `gather` yields them, to `kept`."""
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
    """Forward hook: `act` once the gradient of a module's output is there.

    torch's own backward hooks forbid in-place changes of the output, which CTRL makes.
    """

    def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(lambda _: act())

    return after_forward
