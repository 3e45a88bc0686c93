"""The gradient of a step equals that of its conversations one at a time, however it is divided."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from stages.shared.model import packing, scoring
from stages.shared.model.packing import Example, read_examples
from stages.shared.parallel.group import Group
from stages.shared.parallel.shards import Shards
from stages.shared.step import gradient
from stages.shared.step.fused.patch import fuse
from tests import devices, tiny
from tests.shared.step.adapters import CPU, Gradients, distance, gradients_of, moved

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
    weights = [
        torch.tensor(e.loss_mask[1:] * (1 if e.weights is None else e.weights[1:]))
        for e in examples
    ]
    for example, weight in zip(examples, weights, strict=True):
        ids = torch.tensor(example.input_ids)[None]
        logits = model(input_ids=ids).logits[0, :-1]
        losses = cross_entropy(logits, ids[0, 1:], reduction="none") * weight
        (losses.sum() / sum(map(torch.sum, weights))).backward()
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
        sum(example.loss_weight for example in examples),
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
    sharded: bool = False,
) -> tuple[float, Gradients]:
    model = moved(folders[0])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if attention:
        model.set_attn_implementation(attention)
    if fused:
        fuse(model)
    if sharded and group:
        Shards(model, group, CPU)
        examples = read_examples(folders[1] / "eval.parquet")
        scoring.score(model, examples, CPU, torch.float32, "score", (group.rank, group.size))
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


@pytest.fixture(scope="module")
def weighted(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every second conversation with a weight for each of its halves, one of them 0."""
    table = pq.read_table(folders[1] / "train.parquet")
    weights = list[np.ndarray | None]()
    masks = [np.array(mask) for mask in table["loss_mask"].to_pylist()]
    for row, mask in enumerate(masks):
        column = mask.astype(np.float32)
        column[: np.flatnonzero(mask)[len(mask[mask]) // 2]] *= (0.25, 2.0, 0.0)[row % 3]
        weights.append(column if row % 2 else None)
        masks[row] = column > 0 if row % 2 else mask
    table = table.drop_columns("loss_mask").append_column("loss_mask", pa.array(masks))
    table = table.append_column("weights", pa.array(weights, pa.list_(pa.float32())))
    folder = tmp_path_factory.mktemp("weighted")
    pq.write_table(table, folder / "train.parquet")
    return folders[0], folder


@fused_or_stock
@pytest.mark.parametrize("tokens", [1, 70, 4096])
def test_gradient_follows_the_weights(
    folders: Folders, weighted: Folders, tokens: int, fused: bool
) -> None:
    rows = ROWS["whole"]
    expected = by_the_book(weighted, rows)
    assert distance(step(weighted, rows, tokens, fused=fused)[1], expected) < 1e-5
    assert distance(expected, by_the_book(folders, rows)) > 1e-3


@fused_or_stock
def test_weight_of_2_equals_the_conversation_twice(folders: Folders, fused: bool) -> None:
    one, two = chosen(folders, [3, 9])
    double = replace(one, weights=2 * one.loss_mask.astype(np.float32))
    found = []
    for examples in ([double, two], [one, replace(one, row=99), two]):
        model = moved(folders[0])
        if fused:
            fuse(model)
        loss = accumulate(model, examples, 4096, fused, Group())
        found.append((loss, gradients_of(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert distance(found[0][1], found[1][1]) < 1e-5


# Fused or not, tokens of a micro-batch, and whether it is checkpointed.
WAYS = [(True, 4096, False), (True, 1, True), (False, 70, False), (False, 1, True)]


def steps(
    group: Group, folders: Folders, sharded: bool = False
) -> dict[str, tuple[float, Gradients]]:
    """Steps by every way: whole ones, a short one, and one that leaves processes without work."""
    return {
        f"{name}, {way}": step(folders, rows, way[1], way[2], None, way[0], group, sharded)
        for name, rows in ROWS.items()
        for way in WAYS
    }


def steps_whole_and_sharded(group: Group, every: list[Folders]) -> list[Any]:
    return [(steps(group, folders), steps(group, folders, sharded=True)) for folders in every]


@pytest.mark.parametrize("size", [2, 3])
def test_gradient_is_the_same_on_several_devices(
    folders: Folders, tmp_path: Path, size: int
) -> None:
    """Of sharded weights the bits are those of whole ones."""
    alone = steps(Group(), folders)
    quantized = [tiny.quantize(tmp_path / kind, kind) for kind in ("nf4", "int8", "bf16")]
    every = [folders, *((folder, folders[1]) for folder in quantized[: 3 if size == 2 else 1])]
    found = devices.together(size, steps_whole_and_sharded, every)
    for name, (loss, gradients) in found[0][0].items():
        assert distance(gradients, alone[name][1]) < 1e-5, name
        assert loss == pytest.approx(alone[name][0], rel=1e-6), name
    for whole, sharded in found:
        for name, (loss, gradients) in whole.items():
            assert sharded[name][0] == loss, name
            assert all(torch.equal(sharded[name][1][n], gradients[n]) for n in gradients), name


def test_gradient_differs_if_averaged_by_micro_batch(folders: Folders) -> None:
    """Trainers that divide by the tokens of each micro-batch would not pass these tests."""
    rows = ROWS["whole"]
    each = [by_the_book(folders, [row]) for row in rows]
    averaged = {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}
    assert distance(averaged, by_the_book(folders, rows)) > 1e-3
