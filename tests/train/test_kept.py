"""Adapters are made ready once a step on a GPU, and what is kept of them goes with the step."""

import pytest
import torch

from stages.shared.step.fused import gpu, kept

CPU = torch.device("cpu")


@pytest.mark.parametrize("on_gpu", [True, False])
def test_adapters_are_made_ready_once_a_step_on_a_gpu(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "on_gpu", lambda device: on_gpu)
    made: list[int] = []

    def make() -> kept.Factors:
        made.append(1)
        return torch.ones(1), []

    for _ in range(2):
        with kept.for_a_step():
            for key in ("one", "one", "other"):
                kept.factors(key, CPU, make)
    assert len(made) == (4 if on_gpu else 6)


def test_nothing_is_kept_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "on_gpu", lambda device: True)
    one: kept.Factors = (torch.ones(1), [])
    other: kept.Factors = (torch.zeros(1), [])
    with pytest.raises(KeyError), kept.for_a_step():
        assert kept.factors("one", CPU, lambda: one) is one
        raise KeyError
    assert kept.factors("one", CPU, lambda: other) is other
