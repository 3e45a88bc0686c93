"""What is kept goes with the step, and a room is one place for all matrices."""

import pytest
import torch

from stages.train.fused import kept
from stages.train.fused.kernels import gpu

CPU = torch.device("cpu")


def test_a_room_is_the_same_memory_for_every_matrix_and_grows_to_the_largest() -> None:
    assert kept.room((2, 3), torch.float32) is None
    with kept.for_a_step():
        large = kept.room((4, 6), torch.float32)
        small = kept.room((2, 3), torch.float32)
        half = kept.room((2, 3), torch.bfloat16)
        assert large is not None and small is not None and half is not None
        assert small.shape == (2, 3)
        assert small.data_ptr() == large.data_ptr() != half.data_ptr()
        larger = kept.room((5, 7), torch.float32)
        assert larger is not None and larger.numel() == 35
    assert kept.room((2, 3), torch.float32) is None


@pytest.mark.parametrize("on_gpu", [True, False])
def test_adapters_are_made_ready_once_a_step_on_a_gpu(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "covers", lambda device: on_gpu)
    made: list[int] = []

    def make() -> kept.Factors:
        made.append(1)
        return torch.ones(1), []

    for _ in range(2):
        with kept.for_a_step():
            for key in ("one", "one", "other"):
                kept.factors(key, CPU, make)
    assert len(made) == (4 if on_gpu else 6)


def test_nothing_is_kept_after_an_error() -> None:
    with pytest.raises(KeyError), kept.for_a_step():
        raise KeyError
    assert kept.room((1, 1), torch.float32) is None
