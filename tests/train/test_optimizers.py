"""An optimizer that is loaded goes on as if it had never been saved."""

import io
from contextlib import nullcontext
from typing import Any

import bitsandbytes.optim
import pytest
import torch
from torch import nn

from stages.shared.step import optim
from stages.shared.step.optim import PagedAdamW8bit, PagedAdamW32bit
from tests.train.running import settings

CPU = torch.device("cpu")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128))  # above 4096: 8-bit states


def steps(learner: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        torch.manual_seed(number)
        optimizer.zero_grad()
        learner(torch.randn(8, 128)).square().mean().backward()
        optimizer.step()


def saved_and_read(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_restored_optimizer_goes_on_bit_for_bit(name: str) -> None:
    train = settings(train__optimizer=name, train__weight_decay=0.1).train
    straight, stopped, resumed = model(), model(), model()
    steps(straight, optim.make_optimizer(straight, train, CPU), range(6))
    before = optim.make_optimizer(stopped, train, CPU)
    steps(stopped, before, range(3))
    resumed.load_state_dict(stopped.state_dict())
    after = optim.make_optimizer(resumed, train, CPU)
    optim.restore(after, saved_and_read(before.state_dict()))
    steps(resumed, after, range(3, 6))
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [bitsandbytes.optim.AdamW8bit, PagedAdamW8bit, PagedAdamW32bit])
def test_states_come_back_as_what_they_were(kind: Any) -> None:
    """Each in a buffer that the optimizer itself gives out: a page, where it pages."""
    given: list[torch.Tensor] = []

    class Counting(kind):
        def get_state_buffer(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            given.append(super().get_state_buffer(*args, **kwargs))
            return given[-1]

    with pytest.warns(UserWarning, match="Paged") if "Paged" in kind.__name__ else nullcontext():
        stopped, resumed = model(), model()
        before, after = kind(stopped.parameters()), Counting(resumed.parameters())
        steps(stopped, before, range(3))
        optim.restore(after, saved_and_read(before.state_dict()))
    for one, other in zip(stopped.parameters(), resumed.parameters(), strict=True):
        expected, found = before.state[one], after.state[other]
        assert found.keys() == expected.keys()
        for name in ("state1", "state2"):
            assert any(found[name] is buffer for buffer in given)
            assert found[name].dtype == expected[name].dtype
            assert torch.equal(found[name], expected[name])
    eight_bit = before.state[next(iter(stopped.parameters()))]["state1"].dtype == torch.uint8
    assert eight_bit == ("8bit" in kind.__name__)


def test_weight_decay_is_of_matrices_alone() -> None:
    train = settings(train__weight_decay=0.5).train
    groups = optim.make_optimizer(model(), train, CPU).param_groups
    assert {p.ndim: group["weight_decay"] for group in groups for p in group["params"]} == {
        2: 0.5,
        1: 0.0,
    }


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_the_rate_rises_to_what_is_asked_for_and_every_training_learns(
    scheduler: str, count: int
) -> None:
    train = settings(train__scheduler=scheduler, train__warmup=0.03, train__learning_rate=1e-3)
    optimizer = optim.make_optimizer(model(), train.train, CPU)
    schedule = optim.make_scheduler(optimizer, train.train, count)
    rates = []
    for _ in range(count):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == 1e-3


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("ours", [PagedAdamW8bit, PagedAdamW32bit])
def test_waiting_once_changes_no_bit(ours: Any) -> None:
    """On a GPU where one is asked for, where only pages are moved and the host waits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    theirs = getattr(bitsandbytes.optim, ours.__name__)
    one, other = model().to(device), model().to(device)
    for learner, kind in ((one, ours), (other, theirs)):
        optimizer = kind(learner.parameters(), lr=1e-2, weight_decay=0.1)
        for number in range(4):
            torch.manual_seed(number)
            for parameter in learner.parameters():
                parameter.grad = torch.randn(parameter.shape).to(device)
            next(learner.parameters()).grad = None  # learns nothing
            optimizer.step()
    for mine, its in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)
    moved = [
        not torch.equal(now.cpu(), then)
        for now, then in zip(one.parameters(), model().parameters(), strict=True)
    ]
    assert moved == [False, True, True, True]
