"""One optimizer step has one gradient: it is that of its conversations, one at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from stages.train import distributed
from stages.train.distributed import Group
from tests import tiny
from tests.train.gradients import (
    CPU,
    Gradients,
    chosen,
    gradients,
    learning_model,
    of_step,
    of_steps,
)

WHOLE, SHORT, ONE = [5, 0, 9, 3, 11, 7], [2, 8], [4]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("gradient")
    data = tiny.prepared(root / "prepared")
    lengths = {len(example) for example in chosen(data, WHOLE)}
    assert len(lengths) > 1
    return tiny.quantize(root / "quantized", "fp32"), data


def by_the_book(folders: tuple[Path, Path], rows: list[int]) -> Gradients:
    """Each conversation alone, all logits, the loss written out: no code of the project."""
    model = learning_model(folders[0])
    examples = chosen(folders[1], rows)
    supervised = sum(int(example.loss_mask[1:].sum()) for example in examples)
    for example in examples:
        ids = torch.tensor(example.input_ids)[None]
        logits = model(input_ids=ids).logits[0, :-1]
        mask = torch.tensor(example.loss_mask[1:])
        loss = cross_entropy(logits[mask], ids[0, 1:][mask], reduction="sum") / supervised
        loss.backward()
    return gradients(model)


def difference(one: Gradients, other: Gradients) -> float:
    """The largest relative difference of a gradient, by Frobenius norm."""
    assert one.keys() == other.keys()
    norm = np.linalg.norm
    return max(float(norm(one[n] - other[n]) / norm(other[n])) for n in other)


@pytest.mark.parametrize("path", ["fused", "stock"])
@pytest.mark.parametrize("rows", [WHOLE, SHORT, ONE], ids=["whole", "short", "one"])
@pytest.mark.parametrize(
    ("tokens", "checkpointing", "attention"),
    [
        pytest.param(4096, False, None, id="all at once"),
        pytest.param(1, False, None, id="one at a time"),
        pytest.param(70, False, None, id="some at a time"),
        pytest.param(4096, True, None, id="checkpointed"),
        pytest.param(4096, False, "sdpa", id="by the mask"),
    ],
)
def test_a_step_has_one_gradient(
    folders: tuple[Path, Path],
    rows: list[int],
    tokens: int,
    checkpointing: bool,
    attention: str | None,
    path: str,
) -> None:
    model, data = folders
    _, found = of_step(Group(), CPU, model, data, rows, tokens, checkpointing, attention, path)
    assert difference(found, by_the_book(folders, rows)) < 1e-5


def test_two_processes_have_the_same_gradient(folders: tuple[Path, Path]) -> None:
    """Whole steps, a short one, and one that leaves a process without work."""
    each = [
        (*folders, rows, tokens, checkpointing)
        for rows in (WHOLE, SHORT, ONE)
        for tokens, checkpointing in ((4096, False), (1, True))
    ]
    shared = distributed.launch(2, CPU, of_steps, *each)
    for (_, _, rows, *how), (loss, found) in zip(each, shared, strict=True):
        assert difference(found, by_the_book(folders, rows)) < 1e-5, (rows, how)
        alone, _ = of_step(Group(), CPU, *folders, rows, 1, False)
        assert loss == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("path", ["fused", "stock"])
@pytest.mark.parametrize("rows", [WHOLE, SHORT, ONE], ids=["whole", "short", "one"])
@pytest.mark.parametrize("workers", [2, 3])
def test_helpers_have_the_same_gradient(
    folders: tuple[Path, Path], rows: list[int], workers: int, path: str
) -> None:
    """In a second step, too: what they found in the first is not in it."""
    loss, found = of_step(
        Group(), CPU, *folders, rows, 70, False, path=path, workers=workers, steps=2
    )
    assert difference(found, by_the_book(folders, rows)) < 1e-5
    alone, _ = of_step(Group(), CPU, *folders, rows, 70, False, path=path)
    assert loss == pytest.approx(alone, rel=1e-6)


def test_a_loss_averaged_by_micro_batch_would_not_pass(folders: tuple[Path, Path]) -> None:
    """What trainers do that divide by the tokens of each micro-batch: the test must see it."""
    expected = by_the_book(folders, WHOLE)
    averaged: Gradients = {}
    for row in WHOLE:
        for name, one in by_the_book(folders, [row]).items():
            averaged[name] = averaged.get(name, np.zeros(1)) + one / len(WHOLE)
    assert difference(averaged, expected) > 1e-3
