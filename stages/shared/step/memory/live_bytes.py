"""Live bytes of tensor storage, and their peak in each phase of a step.

A storage counts once, however many views it has, until its last reference is gone: what autograd
saves for the backward pass counts as long as it is saved. The interpreter, libraries and freed
pages are not counted, nor what an operator written in C++ allocates and frees before it returns.
"""

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stages.shared.step.memory.fake_model import Pattern


class LiveBytes(TorchDispatchMode):
    """Counts storages while it is entered.

    Attributes:
        phase: of the step; set by whoever runs it.
        total: bytes alive.
        births: bytes alive by the phase they were allocated in, logits by themselves.
        peaks: by phase, the most bytes and the births at that moment.
    """

    def __init__(
        self,
        held: Iterable[torch.Tensor] = (),
        vocabulary: int = 0,
        python_kernels: Collection[str] | None = None,
    ) -> None:
        """Begin with tensors that are `held` already.

        Logits are known by their width, `vocabulary`; `python_kernels` are the operators of
        bitsandbytes that are looked into, None for all.
        """
        super().__init__()
        self.phase, self.total = "held", 0
        self.births: Counter[str] = Counter()
        self.peaks: dict[str, tuple[int, dict[str, int]]] = {}
        self._vocabulary, self._python_kernels = vocabulary, python_kernels
        self._alive: set[int] = set()
        for tensor in held:
            self._count(tensor)

    @property
    def peak_bytes(self) -> int:
        """The most that was alive in any phase."""
        return max((total for total, _ in self.peaks.values()), default=0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kernel = self._python_kernel(func)
        with self if kernel else nullcontext():
            result = (kernel or func)(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor):
                self._count(one)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size:
            return
        logits = self._vocabulary in tensor.shape and self.phase != "held"
        birth = "logits" if logits else self.phase
        self._alive.add(key)
        weakref.finalize(storage, self._release, key, size, birth)
        self.births[birth] += size
        self.total += size
        if self.total > self.peaks.get(self.phase, (-1,))[0]:
            self.peaks[self.phase] = self.total, dict(self.births)

    def _release(self, key: int, size: int, birth: str) -> None:
        self._alive.discard(key)
        self.births[birth] -= size
        self.total -= size

    def _python_kernel(self, func: Any) -> Any:
        """The Python function behind an operator of bitsandbytes on a CPU, or None."""
        names = self._python_kernels
        if func.namespace != "bitsandbytes" or (names and func._opname not in names):
            return None
        kernel = torch.library.get_kernel(func, "CPU")
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        return lambda *args, **kwargs: kernel.call_boxed(keys, *args, **kwargs)


def name_phases(live: LiveBytes, embedding: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Have `live.phase` follow each row: `start`, `forward 0`, …, `loss`, …, `backward 0`."""

    def start(*_: Any) -> None:
        live.phase = "start"

    def follow(index: int, block: nn.Module) -> None:
        def enter(*_: Any) -> None:
            if not live.phase.startswith("backward"):  # where it is computed again
                live.phase = f"forward {index}"

        def leave(_module: Any, _inputs: Any, output: Any) -> None:
            if live.phase.startswith("backward"):
                return
            if index == len(blocks) - 1:
                live.phase = "loss"
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(go_back)

        def go_back(_: Any) -> None:
            live.phase = f"backward {index}"

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)

    embedding.register_forward_pre_hook(start)
    for index, block in enumerate(blocks):
        follow(index, block)


def extend(live: LiveBytes, pattern: Pattern) -> dict[str, dict[str, int]]:
    """The peak of each phase in a model of all blocks: transient bytes by part.

    The phases have the numbers of their blocks in that model, from 1.
    """

    def repeated(phase: str) -> int:
        """Bytes of the blocks that are not run, at the peak of a phase."""
        births = live.peaks[phase][1]
        names = (f"{way} {i}" for i in pattern.repeated for way in ("forward", "backward"))
        return pattern.repeats * sum(births.get(name, 0) for name in names)

    held, _ = live.peaks.pop("held")  # before the step
    peaks = {}
    for phase, (total, births) in live.peaks.items():
        way, _, number = phase.partition(" ")
        label, more = phase, repeated(phase)
        if number.isdigit():
            index = int(number)
            follows = index >= pattern.repeated.start
            if way == "forward":  # what only waits for Python to leave a block counts once
                more = repeated("loss") if follows else 0
            elif index in pattern.repeated:
                more = repeated(f"backward {pattern.run - 1}")
            index += pattern.repeats * pattern.period if follows else 0
            label = f"{way} pass of block {index + 1} of {pattern.layers}"
        logits, workspace = births.get("logits", 0), births.get(phase, 0)
        activations = total - held - logits - workspace + more
        peaks[label] = {"activations": activations, "logits": logits, "workspace": workspace}
    return peaks
