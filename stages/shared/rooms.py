"""Places for the large tensors of a micro-batch, on a CPU, beside the C library's heap.

What is saved for the backward pass stood there between temporaries that came and went, and kept
their places open: of 1.3 GB that a process held, 0.2 were freed pages that nothing fitted into. All
that is saved goes at once, when the gradient of its micro-batch is there; so it is laid end to end
in one room, and the largest temporaries in another: the scores of attention, the logits, and the
dequantized matrix of the moment, which a product finds in the cache where it reads it in the place
of the last one.
"""

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

CHUNK_BYTES = 64 * 2**20  # of addresses: a page of it is there when it is written to
ALIGNMENT = 64  # bytes, a line of the cache


@dataclass(frozen=True)
class Place:
    """How far a room is filled.

    Attributes:
        chunk: the one that is being filled.
        end: bytes of it that are taken.
        given: bytes of all tensors before it, what lies between them left out.
    """

    chunk: int = 0
    end: int = 0
    given: int = 0


class Room:
    """Chunks that are filled one after the other; what is taken is not given back one by one.

    Attributes:
        chunks: uint8 [bytes] each.
        place: how far they are filled.
    """

    def __init__(self) -> None:
        """Nothing is there."""
        self.chunks: list[torch.Tensor] = []
        self.place = Place()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next piece."""
        size = math.prod(shape) * dtype.itemsize
        chunk, start = self.place.chunk, self.place.end
        while chunk < len(self.chunks) and start + size > len(self.chunks[chunk]):
            chunk, start = chunk + 1, 0
        if chunk == len(self.chunks):
            self.chunks.append(_mapped(max(CHUNK_BYTES, size)))
        end = start + -(-size // ALIGNMENT) * ALIGNMENT
        self.place = Place(chunk, end, self.place.given + size)
        # No view: to autograd a write to one would be a write to all that is saved in the chunk.
        storage = self.chunks[chunk].untyped_storage()
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return torch.empty(0, dtype=dtype).set_(storage, start // dtype.itemsize, shape, strides)


def _mapped(size: int) -> torch.Tensor:
    """Pages of its own, which go back to the system when it is let go of."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)


_saved, _scratch = Room(), Room()
_entered: set[Room] = set()


@contextmanager
def of_a_micro_batch(*, saving: bool) -> Iterator[None]:
    """While it is entered, tensors come from the rooms.

    Args:
        saving: what is saved too. Where blocks are checkpointed, what one of them saves goes
            before the next, and not at once.
    """
    _entered.update((_saved, _scratch) if saving else (_scratch,))
    try:
        yield
    finally:
        _entered.clear()
        _saved.place = _scratch.place = Place()


@contextmanager
def scratched() -> Iterator[None]:
    """What the block takes by `scratch` is free again behind it."""
    place = _scratch.place
    try:
        yield
    finally:
        _scratch.place = place


def saved(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor [shape] for what is saved until the micro-batch's gradient is there."""
    return _empty(_saved, shape, dtype, device)


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor [shape] that is used until the block of `scratched` around it ends."""
    return _empty(_scratch, shape, dtype, device)


def let_go() -> None:
    """Give their memory back, until a micro-batch needs it again."""
    _saved.chunks.clear()
    _scratch.chunks.clear()


def both() -> tuple[Room, Room]:
    """That of what is saved, and that of what is used for a while."""
    return _saved, _scratch


def _empty(
    room: Room, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    if room in _entered and device.type == "cpu":
        return room.take(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)
