"""Pieces of a room do not touch each other, and are there again for the next micro-batch."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from stages.shared import rooms

CPU = torch.device("cpu")


def span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def test_pieces_are_aligned_and_apart() -> None:
    with rooms.of_a_micro_batch(saving=True):
        found = [
            rooms.saved((3, 5), torch.float32, CPU),
            rooms.saved((7,), torch.bfloat16, CPU),
            rooms.saved((2, 2, 2), torch.float32, CPU),
            rooms.scratch((9,), torch.float32, CPU),
        ]
        for number, tensor in enumerate(found):
            tensor.fill_(number)
        assert [int(t.min()) for t in found] == [int(t.max()) for t in found] == [0, 1, 2, 3]
        assert [tuple(t.shape) for t in found] == [(3, 5), (7,), (2, 2, 2), (9,)]
        assert all(t.is_contiguous() and t.data_ptr() % rooms.ALIGNMENT == 0 for t in found)
        assert rooms.both()[0].place.given == 60 + 14 + 32


def test_a_micro_batch_begins_where_the_last_one_began() -> None:
    places = []
    for _ in range(2):
        with rooms.of_a_micro_batch(saving=True):
            places.append(span(rooms.saved((100,), torch.float32, CPU)))
    assert places[0] == places[1]


def test_scratch_is_free_again_behind_its_block() -> None:
    with rooms.of_a_micro_batch(saving=True):
        kept = rooms.scratch((4,), torch.float32, CPU)
        for _ in range(2):
            with rooms.scratched():
                once = rooms.scratch((4,), torch.float32, CPU)
        with rooms.scratched():
            assert span(rooms.scratch((4,), torch.float32, CPU)) == span(once)
        assert span(once) != span(kept)


def test_what_does_not_fit_into_a_chunk_goes_into_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "CHUNK_BYTES", 4096)
    room = rooms.Room()
    sizes = (3000, 2000, 9000, 500)
    found = [room.take((size,), torch.uint8).fill_(i) for i, size in enumerate(sizes)]
    assert [len(chunk) for chunk in room.chunks] == [4096, 4096, 9000, 4096]
    assert [set(t.tolist()) for t in found] == [{0}, {1}, {2}, {3}]
    assert room.place.given == sum(sizes)


@pytest.mark.parametrize("entered", [False, True])
def test_elsewhere_a_tensor_is_one_of_its_own(entered: bool) -> None:
    with rooms.of_a_micro_batch(saving=False) if entered else nullcontext():
        found = rooms.saved((4,), torch.float32, CPU)
        once = rooms.scratch((4,), torch.float32, CPU)
    assert found.untyped_storage().nbytes() == 16
    assert (once.untyped_storage().nbytes() == 16) == (not entered)
    assert rooms.both()[0].place == rooms.Place()


def test_after_an_error_nothing_is_taken() -> None:
    with pytest.raises(KeyError), rooms.of_a_micro_batch(saving=True):
        rooms.saved((4,), torch.float32, CPU)
        raise KeyError
    assert rooms.both()[0].place == rooms.Place()
    assert rooms.saved((4,), torch.float32, CPU).untyped_storage().nbytes() == 16


def test_memory_is_given_back() -> None:
    with rooms.of_a_micro_batch(saving=True):
        rooms.saved((4,), torch.float32, CPU)
        rooms.scratch((4,), torch.float32, CPU)
    assert all(room.chunks for room in rooms.both())
    rooms.let_go()
    assert not any(room.chunks for room in rooms.both())


def test_autograd_sees_no_write_to_one_piece_in_another() -> None:
    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            twice = torch.mul(x, 2, out=rooms.saved(x.shape, x.dtype, x.device))
            ctx.save_for_backward(twice)
            return torch.square(x, out=rooms.saved(x.shape, x.dtype, x.device))

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * ctx.saved_tensors[0]

    x = torch.tensor([3.0], requires_grad=True)
    with rooms.of_a_micro_batch(saving=True):
        y = Squared.apply(Squared.apply(x))  # the second writes beside what the first has saved
        y.backward()
    assert x.grad is not None
    assert x.grad.item() == 4 * 27
