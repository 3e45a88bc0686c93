"""Of the training benchmark for GPUs, what a CPU can check: all of it, on two layers."""

import dataclasses
import json
import sys
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import (
    page,
    random_folder,
    training_cuda,
    training_cuda_picture,
    training_cuda_table,
)
from benchmarks.training_cuda_table import Result, Way
from stages.plan.named import CONFIGS
from stages.shared import models, precision
from stages.shared.core import files
from stages.shared.examples import read_examples
from tests.workspace import ROOT

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
LENGTH = 48


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    LlamaConfig(**SHAPE, tie_word_embeddings=False).save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    made = tmp_path_factory.mktemp("made")
    training_cuda.make_inputs(config, made, LENGTH, CPU)
    return made


def measured(config, folder, way, device):
    worker = training_cuda.start(way, folder, LENGTH, device, sys.executable)
    return training_cuda.measure("tiny", config, LENGTH, way, worker)


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_model_is_read_from_its_folder_as_it_was_made(tied, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda kind: True)  # as on a GPU
    made = []
    quantize = random_folder.qlora_model

    def kept(*args):
        made.append(quantize(*args))
        return made[-1]

    monkeypatch.setattr(random_folder, "qlora_model", kept)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=tied)
    random_folder.write_model(config, tmp_path / "model", CPU)
    read = models.load_model(tmp_path / "model", CPU)
    assert len(models.quantized_layers(read)) == 2 * 7
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = made[0].eval().base_model(input_ids=ids).logits
        assert torch.equal(read(input_ids=ids).logits, expected)


def test_conversations_have_one_length_and_are_learnt_but_for_their_first_token(folder):
    examples = read_examples(folder / "data" / "train.parquet")
    assert len(examples) == training_cuda.BATCH * training_cuda.STEPS
    assert {len(example) for example in examples} == {LENGTH}
    assert {example.supervised_tokens for example in examples} == {LENGTH - 1}


def test_a_token_of_the_8b_takes_31_9_billion_operations():
    cost = training_cuda.operations_per_token(CONFIGS / "Llama-3-8B.json", 2048)
    assert cost == pytest.approx(31.9e9, rel=0.002)


@pytest.mark.parametrize("way", [Way("ours", 2, True), Way("trl", 4, False)], ids=["ours", "trl"])
def test_a_way_is_measured_end_to_end(config, folder, way, monkeypatch):
    if way.who == "trl":
        pytest.importorskip("trl", reason="trl is a dependency of the benchmark only")
    monkeypatch.setattr(training_cuda, "STEPS", 2)
    monkeypatch.setattr(training_cuda, "WARM", 1)
    result = measured(config, folder, way, "cpu")
    [step] = result.steps
    assert step["tokens"] == training_cuda.BATCH * LENGTH
    assert step["supervised_tokens"] == training_cuda.BATCH * (LENGTH - 1)
    assert result.tokens_per_second > 0 and result.share > 0
    if way.who == "ours":
        assert result.resolved == {
            "micro_batch_tokens": 2 * LENGTH,
            "gradient_checkpointing": True,
            "unfused_because": None,
        }


def test_what_there_is_no_room_for_is_a_line_of_the_table(config, folder):
    refused = measured(config, folder, Way("ours", None, None, 1), "cpu")
    assert not refused.steps
    assert "| tiny within 1 GiB | ours | as planned | no | no room | | | |" in (
        training_cuda_table.table([refused])
    )


def test_a_peer_is_tried_with_and_without_checkpointing_and_has_its_least_within_a_cap():
    ours, *others = training_cuda.ways(2048, None, ["trl"])
    assert ours == Way("ours", None, None)
    assert others == [Way("trl", 4, False), Way("trl", 4, True)]
    capped = list(training_cuda.ways(2048, 16, ["trl"]))
    assert capped == [Way("ours", None, None, 16), Way("trl", 1, True, 16)]


def test_while_a_worker_works_the_next_one_is_there():
    started: list[int] = []

    def starting(number: int) -> Any:
        started.append(number)
        return number

    starts = [partial(starting, number) for number in range(3)]
    seen = [(one, len(started)) for one in training_cuda.ahead(starts)]
    assert seen == [(0, 2), (1, 3), (2, 3)]
    assert list(training_cuda.ahead([])) == []


def test_a_peer_is_looked_for_where_it_may_have_an_environment_of_its_own(tmp_path):
    other = tmp_path / "python"
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth" / "__init__.py").touch()
    other.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    other.chmod(0o755)
    assert training_cuda.peers(str(other))["unsloth"] == str(other)
    assert "unsloth" not in training_cuda.peers(sys.executable)


def test_the_share_counts_useful_operations_at_the_rate_before_the_step():
    steps = [
        {"tokens": 1000, "seconds": 2.0, "matrix_rate": 1e13, "peak_bytes": 2**31},
        {"tokens": 1000, "seconds": 1.0, "matrix_rate": 2e13, "peak_bytes": 2**30},
    ]
    one = Result("tiny", Way("trl", 1, True), {}, 1e10, steps)
    assert one.share == pytest.approx(0.5)
    where = {"device": "a card", "versions": {"torch": "2.13"}}
    found = json.loads(json.dumps({"environment": where, "results": [dataclasses.asdict(one)]}))
    text = training_cuda_table.text(found)
    assert text.startswith("a card; torch 2.13.")
    assert text.endswith("| tiny | trl | 1 | yes | 750 | 8 | 50% | 2.00 |")


def test_a_peer_that_fails_is_a_line_of_the_table_and_ours_ends_the_benchmark(config, folder):
    broken = folder.with_name("nowhere")
    failed = measured(config, broken, Way("trl", 1, False), "cpu")
    assert failed.failure
    assert "| tiny | trl | 1 | no | failed | | | |" in training_cuda_table.table([failed])
    with pytest.raises(SystemExit, match="error: python -m benchmarks"):
        measured(config, broken, Way("ours", 1, False), "cpu")


def test_what_was_measured_before_stays_but_for_what_is_measured_again(tmp_path, monkeypatch):
    path, where = tmp_path / "found.json", {"device": "a card"}
    monkeypatch.setattr(training_cuda, "RESULTS", path)
    assert training_cuda.measured_before([], where) == []
    results = [Result(name, Way("ours", 1, False), {}, 1.0, []) for name in ("one", "other")]
    written = [dataclasses.asdict(result) for result in results]
    files.write_json(path, {"environment": where, "results": written})
    assert training_cuda.measured_before(["one"], where) == results[1:]
    assert training_cuda.measured_before(["one"], {"device": "another"}) == []


def test_the_picture_has_a_bar_for_each_way_that_took_steps(tmp_path):
    step = {"tokens": 1000, "seconds": 2.0, "matrix_rate": 1e13, "peak_bytes": 2**31}
    results = [
        Result("tiny", Way("ours", None, None, 16), {"gradient_checkpointing": True}, 1e10, [step]),
        Result("tiny", Way("trl", 1, False), {}, 1e10, []),
    ]
    assert training_cuda_picture.named(results[0]) == "tiny in 16 GiB\nours, checkpointed"
    training_cuda_picture.draw(results, tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    assert drawn.count("ours, checkpointed") == 1
    assert "trl" not in drawn


def test_the_page_says_what_was_measured_or_that_nothing_was():
    said = (ROOT / page.PAGE).read_text(encoding="utf-8")
    path = ROOT / training_cuda_table.RESULTS
    if path.exists():
        assert training_cuda_table.text(files.read_json(path)) in said
    else:
        assert "The figures of a GPU are missing" in said.replace("\n", " ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training_cuda"])
    with pytest.raises(SystemExit, match=r"^error: this machine has no CUDA device that torch can"):
        training_cuda.main()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_a_way_is_measured_within_its_cap(config, folder):
    way = Way("ours", None, None, 4)
    result = measured(config, folder, way, "cuda")
    assert max(step["peak_bytes"] for step in result.steps) < 4 * 2**30
