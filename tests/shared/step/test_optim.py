"""Optimizers, restored, continue bit for bit."""

import io
from typing import Any

import pytest
import torch
from torch import nn

from stages.shared.step import optim
from stages.shared.weights import bnb
from tests.train.running import settings

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128))  # above 4096: 8-bit states


def steps(trained: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        torch.manual_seed(number)
        optimizer.zero_grad()
        trained(torch.randn(8, 128)).square().mean().backward()
        optimizer.step()


def written_and_read(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_restored_optimizer_continues_bit_for_bit(name: str) -> None:
    train = settings(train__optimizer=name, train__weight_decay=0.1).train
    straight, stopped, resumed = model(), model(), model()
    steps(straight, optim.make_optimizer(straight.parameters(), train, CPU), range(6))
    before = optim.make_optimizer(stopped.parameters(), train, CPU)
    steps(stopped, before, range(3))
    resumed.load_state_dict(stopped.state_dict())
    after = optim.make_optimizer(resumed.parameters(), train, CPU)
    optim.restore(after, written_and_read(before.state_dict()))
    steps(resumed, after, range(3, 6))
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [bnb.AdamW8bit, bnb.PagedAdamW8bit, bnb.PagedAdamW32bit])
def test_restored_states_keep_dtype_and_pages(kind: Any) -> None:
    """Each in a buffer that the optimizer itself allocates: a page, where it pages."""
    buffers: list[torch.Tensor] = []

    class Recording(kind):
        def get_state_buffer(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            buffers.append(super().get_state_buffer(*args, **kwargs))
            return buffers[-1]

    stopped, resumed = model(), model()
    before, after = kind(stopped.parameters()), Recording(resumed.parameters())
    steps(stopped, before, range(3))
    optim.restore(after, written_and_read(before.state_dict()))
    for one, other in zip(stopped.parameters(), resumed.parameters(), strict=True):
        expected, restored = before.state[one], after.state[other]
        assert restored.keys() == expected.keys()
        for name in ("state1", "state2"):
            assert any(restored[name] is buffer for buffer in buffers)
            assert restored[name].dtype == expected[name].dtype
            assert torch.equal(restored[name], expected[name])
    assert (before.state[stopped[0].weight]["state1"].dtype == torch.uint8) == (
        "8bit" in kind.__name__
    )


def test_weight_decay_is_for_matrices_alone() -> None:
    groups = optim.make_optimizer(
        model().parameters(), settings(train__weight_decay=0.5).train, CPU
    ).param_groups
    decay = {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {2: 0.5, 1: 0.0}


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_schedule_reaches_the_learning_rate(scheduler: str, count: int) -> None:
    train = settings(
        train__scheduler=scheduler, train__warmup=0.03, train__learning_rate=1e-3
    ).train
    optimizer = optim.make_optimizer(model().parameters(), train, CPU)
    schedule = optim.make_scheduler(optimizer, train, count)
    rates = []
    for _ in range(count):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == 1e-3
