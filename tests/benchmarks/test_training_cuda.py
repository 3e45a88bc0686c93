"""Of the training benchmark for GPUs, what a CPU can check: all of it, on two layers."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import page, random_folder, training_cuda, training_cuda_table
from benchmarks.training_cuda_table import Result, Way
from stages.plan.named import CONFIGS
from stages.shared import files, models, precision
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
    result = training_cuda.measure("tiny", config, folder, LENGTH, way, "cpu")
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
    refused = training_cuda.measure(
        "tiny", config, folder, LENGTH, Way("ours", None, None, 1), "cpu"
    )
    assert not refused.steps
    assert "| tiny within 1 GiB | ours | as planned | no | no room | | |" in (
        training_cuda_table.table([refused])
    )


def test_a_peer_is_tried_both_ways_and_a_cap_leaves_ours_to_the_plan():
    tried = list(training_cuda.ways(2048, None, ["trl"]))
    assert Way("ours", 4, False) in tried
    assert {(w.micro_batch, w.gradient_checkpointing) for w in tried if w.who == "trl"} == {
        (4, False),
        (1, False),
        (4, True),
        (1, True),
    }
    capped = list(training_cuda.ways(2048, 16, []))
    assert capped == [Way("ours", None, None, 16)]


def test_the_share_counts_useful_operations_at_the_rate_before_the_step():
    steps = [
        {"tokens": 1000, "seconds": 2.0, "matrix_rate": 1e13, "peak_bytes": 2**31},
        {"tokens": 1000, "seconds": 1.0, "matrix_rate": 2e13, "peak_bytes": 2**30},
    ]
    one = Result("tiny", Way("trl", 1, True), {}, 1e10, steps)
    assert one.share == pytest.approx(0.5)
    found = {"environment": {"device": "a card"}, "results": [dataclasses.asdict(one)]}
    text = training_cuda_table.text(json.loads(json.dumps(found)))
    assert text.startswith("a card.")
    assert text.endswith("| tiny | trl | 1 | yes | 750 | 50% | 2.00 |")


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
    result = training_cuda.measure("tiny", Path(config), folder, LENGTH, way, "cuda")
    assert max(step["peak_bytes"] for step in result.steps) < 4 * 2**30
