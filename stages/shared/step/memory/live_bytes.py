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

from stages.shared.step.memory.architecture import Pattern


class LiveBytes(TorchDispatchMode):
    """Counts storages while it is entered.

    Attributes:
        phase: what is going on now; set by whoever runs the step.
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


def name_phases(live: LiveBytes, blocks: Sequence[nn.Module]) -> None:
    """Have `live.phase` follow the blocks: `forward 0`, …, `loss`, …, `backward 0`."""

    def enters(index: int) -> Any:
        def hook(*_: Any) -> None:
            if not live.phase.startswith("backward"):  # where it is computed again
                live.phase = f"forward {index}"

        return hook

    def leaves(index: int) -> Any:
        def goes_back(_: Any) -> None:
            live.phase = f"backward {index}"

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if live.phase.startswith("backward"):
                return
            if index == len(blocks) - 1:
                live.phase = "loss"
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(goes_back)

        return hook

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(enters(index))
        block.register_forward_hook(leaves(index))


def extend(live: LiveBytes, held: int, pattern: Pattern) -> dict[str, dict[str, int]]:
    """The peak of each phase in a model of all blocks: transient bytes by part.

    The phases have the numbers of their blocks in that model, from 1. `held` are the bytes from
    before the step.
    """
    last = pattern.run - 1

    def of_period(births: dict[str, int]) -> int:
        names = (f"{way} {i}" for i in pattern.repeated for way in ("forward", "backward"))
        return pattern.repeats * sum(births.get(name, 0) for name in names)

    peaks = {}
    for phase, (total, births) in live.peaks.items():
        if phase == "held":
            continue
        way, _, number = phase.partition(" ")
        index = int(number) if number.isdigit() else None
        more, words = of_period(births), phase
        if index is not None:
            if way == "forward":  # what only waits for Python to leave a block counts once
                more = of_period(live.peaks["loss"][1]) if index >= pattern.start else 0
            elif index in pattern.repeated:
                more = of_period(live.peaks[f"backward {last}"][1])
            passed = pattern.repeats * pattern.period if index >= pattern.start else 0
            words = f"{way} pass of block {index + passed + 1} of {pattern.layers}"
        logits, workspace = births.get("logits", 0), births.get(phase, 0)
        activations = total - held - logits - workspace + more
        peaks[words] = {"activations": activations, "logits": logits, "workspace": workspace}
    return peaks
