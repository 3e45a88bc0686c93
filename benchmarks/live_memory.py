"""The bytes of live tensor storage, and their peak, while a block of code runs.

Every storage that an operator returns is counted once, however many views it has, and until the
last of them is gone: what autograd saved for backward counts as long as it is saved. So on a CPU,
whose allocator keeps no such figure, the peak of a real training step is known to the byte, and
free of what the process's resident set adds: the interpreter, libraries, and freed pages.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveMemory(TorchDispatchMode):
    """Counts storages while it is entered.

    An operator that bitsandbytes wrote in Python (a 4-bit product dequantizes its matrix first) is
    looked into, and its temporaries count. What an operator written in C++ allocates and frees
    again before it returns does not.

    Attributes:
        live_bytes: of all storages that are alive now.
        peak_bytes: the most that it has been.
        peak_storages: at that instant, (bytes, the operator that returned it), the largest first;
            only if `keep_storages`, which is slow.
    """

    def __init__(self, held: Iterable[torch.Tensor] = (), *, keep_storages: bool = False) -> None:
        """Begin with storages that are there already: weights, optimizer states, inputs."""
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.keep_storages = keep_storages
        self.peak_storages: list[tuple[int, str]] = []
        self._live: dict[int, tuple[int, str]] = {}
        for tensor in held:
            self._count(tensor, "held")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kernel = _python_kernel(func, args)
        if kernel is None:
            result = func(*args, **(kwargs or {}))
        else:
            with self:
                result = kernel(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda tensor: self._count(tensor, str(func)), result)
        return result

    def _count(self, tensor: torch.Tensor, origin: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live and size:
            self._live[key] = size, origin
            weakref.finalize(storage, self._release, key)
            self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            if self.keep_storages:
                self.peak_storages = sorted(self._live.values(), reverse=True)

    def _release(self, key: int) -> None:
        self.live_bytes -= self._live.pop(key)[0]


def _python_kernel(func: Any, args: tuple[Any, ...]) -> Any:
    """The Python function behind an operator of bitsandbytes, or None for any other operator."""
    if getattr(func, "namespace", "") != "bitsandbytes":
        return None
    device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
    if device == "meta":  # where it is not run
        return None
    kernel = torch.library.get_kernel(func, device.upper())
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
    return lambda *a, **k: kernel.call_boxed(keys, *a, **k)
