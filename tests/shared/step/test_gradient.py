"""The gradient of a step equals that of its conversations one at a time, however it is divided."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from stages.shared.model import packing
from stages.shared.model.packing import Example, read_examples
from stages.shared.step import gradient
from stages.shared.step.fused.patch import fuse
from stages.train.distributed import Group
from tests import devices, tiny
from tests.shared.step.adapters import Gradients, distance, gradients_of, moved

ROWS = {"whole": [5, 0, 9, 3, 11, 7], "short": [2, 8], "one": [4]}
rows_of_a_step = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
fused_or_stock = pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
Folders = tuple[Path, Path]  # of the model, and of the data


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("gradient")
    return tiny.quantize(root / "quantized", "fp32"), tiny.prepared(root / "prepared")


def chosen(folders: Folders, rows: list[int]) -> list[Example]:
    examples = read_examples(folders[1] / "train.parquet")
    return [examples[row] for row in rows]


def by_the_book(folders: Folders, rows: list[int]) -> Gradients:
    """Each conversation alone, all logits, the loss written out: no code of the project."""
    model = moved(folders[0])
    examples = chosen(folders, rows)
    supervised = sum(int(example.loss_mask[1:].sum()) for example in examples)
    for example in examples:
        ids = torch.tensor(example.input_ids)[None]
        logits = model(input_ids=ids).logits[0, :-1]
        mask = torch.tensor(example.loss_mask[1:])
        loss = cross_entropy(logits[mask], ids[0, 1:][mask], reduction="sum") / supervised
        loss.backward()
    return gradients_of(model)


def accumulate(
    model: PeftModel, examples: list[Example], tokens: int, fused: bool, group: Group
) -> float:
    """This process's part of a step, and the sum over the group."""
    parts = packing.even_passes(packing.partition(examples, tokens, group.size), packs=True)
    model.zero_grad()
    loss = gradient.accumulate(
        model,
        parts[group.rank],
        sum(example.supervised_tokens for example in examples),
        dtype=torch.float32,
        fused=fused,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        all_reduce=group.all_reduce,
    )
    return loss.item()


def step(
    folders: Folders,
    rows: list[int],
    tokens: int,
    checkpointing: bool = False,
    attention: str | None = None,
    fused: bool = True,
    group: Group | None = None,
) -> tuple[float, Gradients]:
    model = moved(folders[0])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if attention:
        model.set_attn_implementation(attention)
    if fused:
        fuse(model)
    loss = accumulate(model, chosen(folders, rows), tokens, fused, group or Group())
    return loss, gradients_of(model)


@fused_or_stock
@rows_of_a_step
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
def test_gradient_is_that_of_each_conversation(
    folders: Folders,
    rows: list[int],
    tokens: int,
    checkpointing: bool,
    attention: str | None,
    fused: bool,
) -> None:
    assert len({len(example) for example in chosen(folders, ROWS["whole"])}) > 1
    _, gradients = step(folders, rows, tokens, checkpointing, attention, fused)
    assert distance(gradients, by_the_book(folders, rows)) < 1e-5


# Fused or not, tokens of a micro-batch, and whether it is checkpointed.
WAYS = [(True, 4096, False), (True, 1, True), (False, 70, False), (False, 1, True)]


def steps(group: Group, folders: Folders) -> dict[str, tuple[float, Gradients]]:
    """Steps by every way: whole ones, a short one, and one that leaves processes without work."""
    return {
        f"{name}, {way}": step(folders, rows, way[1], way[2], None, way[0], group)
        for name, rows in ROWS.items()
        for way in WAYS
    }


@pytest.mark.parametrize("size", [2, 3])
def test_gradient_is_the_same_on_several_devices(folders: Folders, size: int) -> None:
    alone, shared = steps(Group(), folders), devices.together(size, steps, folders)
    for name, (loss, gradients) in shared.items():
        assert distance(gradients, alone[name][1]) < 1e-5, name
        assert loss == pytest.approx(alone[name][0], rel=1e-6), name


def test_gradient_differs_if_averaged_by_micro_batch(folders: Folders) -> None:
    """Trainers that divide by the tokens of each micro-batch would not pass these tests."""
    rows = ROWS["whole"]
    each = [by_the_book(folders, [row]) for row in rows]
    averaged = {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}
    assert distance(averaged, by_the_book(folders, rows)) > 1e-3
