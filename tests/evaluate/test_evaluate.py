"""Replies and metrics."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

from stages.evaluate import generate
from stages.evaluate.evaluate import evaluate, metrics
from stages.evaluate.inputs import Evaluate
from stages.shared.core import files
from stages.shared.model import loading
from tests import tiny
from tests.architectures import BESIDES, HEAD, MIXTURES, OTHERS, SHAPE, random, saved

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("reply", "answer", "correct"),
    [
        ("48 + 17 = 65.\n65", "65", True),
        ("It is Monday.\nMONDAY. ", "Monday", True),
        ("one line, 65", "65", False),
        ("65\nand so it is", "65", False),
        ("A  B\u00a0C", "a b c", True),  # a no-break space is a space (NFKC)
        ("Water Candle", "WATER CANDLE", False),  # asked for in capitals
        ("→ upper\nWATER CANDLE.", "WATER CANDLE", True),
        ("ß", "SS", False),
        ("", "65", False),
        ("\n\n", "", False),
        ("So:\na\nb", "a\nb", True),
        ("b", "a\nb", False),
    ],
)
def test_exact_match_compares_the_last_line(reply: str, answer: str, correct: bool) -> None:
    assert generate.is_correct(reply, answer) is correct


def test_order_puts_rows_with_an_answer_first() -> None:
    has_answer = [False, True, False, True, True]
    chosen = generate.order_rows(has_answer, seed=1)
    assert set(chosen[:3]) == {1, 3, 4}
    assert chosen == generate.order_rows(has_answer, seed=1)
    assert sorted(chosen) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe"])
def test_batched_replies_equal_greedy_ones_by_one(tmp_path: Path, kind: str) -> None:
    model: Any = tiny.model()
    if kind != "llama":
        model = loading.load_model(saved(tmp_path, kind, MIXTURES[kind]), CPU)
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer.encode(text) for text in ("two", "What is two plus two?", "is it")]
    together = generate.generate(model, tokenizer, prompts, [2], 8, CPU, torch.float32)
    for prompt, reply in zip(prompts, together, strict=True):
        assert generate.generate(model, tokenizer, [prompt], [2], 8, CPU, torch.float32) == [reply]
        ids = list(prompt)
        for _ in range(8):  # greedy, without a cache
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        assert reply.stopped == (ids[-1] == 2)
        assert reply.text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_own_generation_config_changes_no_reply() -> None:
    """What we leave open, transformers takes from the model: a penalty, beams, several replies."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts = [tokenizer.encode(text) for text in ("two", "What is two plus two?")]
    expected = generate.generate(model, tokenizer, prompts, [2], 8, CPU, torch.float32)
    model.generation_config = GenerationConfig(
        repetition_penalty=1.5, num_beams=2, num_return_sequences=2, min_new_tokens=8
    )
    assert generate.generate(model, tokenizer, prompts, [2], 8, CPU, torch.float32) == expected
    tuned = get_peft_model(tiny.model(), LoraConfig(task_type="CAUSAL_LM"))
    tuned.get_base_model().generation_config = GenerationConfig(repetition_penalty=1.5)
    assert generate.generate(tuned, tokenizer, prompts, [2], 8, CPU, torch.float32) == expected


def test_groups_have_one_length_and_bounded_tokens() -> None:
    prompts = [[0] * length for length in (4000, 10, 3000, 20, 30, 9000)]
    assert generate.group_by_length(prompts, 64, 2) == [[1, 3], [4, 2], [0], [5]]
    assert generate.group_by_length(prompts, 64, 32) == [[1, 3, 4], [2, 0], [5]]
    assert generate.group_by_length([], 64, 32) == []


def test_length_dependent_models_are_not_batched() -> None:
    model = tiny.model()
    assert generate.may_batch(model)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not generate.may_batch(model)


@pytest.mark.parametrize("kind", ["minimax", "bart", "mbart", "pegasus", "trocr", "rwkv", "bloom"])
def test_reply_depends_on_no_padding(kind: str) -> None:
    besides: dict[str, Any] = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4}
    if kind == "minimax":
        besides = {"layer_types": ["linear_attention", "full_attention"]} | HEAD
        besides |= {"num_local_experts": 2}
    model = random(kind, OTHERS.get(kind, besides))
    assert generate.may_batch(model) == (kind == "bloom")
    prompts = [[*range(5, 25)], [30, 31], [77]]

    def reply(*some: list[int]) -> list[generate.Reply]:
        return generate.generate(model, tiny.tokenizer(), some, [2], 10, CPU, torch.float32)

    assert reply(*prompts) == [reply(prompt)[0] for prompt in prompts]


def test_cut_prompt_is_not_generated_from(tmp_path: Path) -> None:
    """It would be longer than anything that the model was trained and scored on."""
    base, data = tiny.save(tmp_path / "base"), tiny.prepared(tmp_path / "prepared")
    table = pq.read_table(data / "eval.parquet").to_pylist()
    for row in table[:20]:
        row["input_ids"], row["loss_mask"] = row["input_ids"][:5], [True] * 5
    pq.write_table(pa.Table.from_pylist(table), data / "eval.parquet")
    settings = Evaluate(generate_rows=24, max_new_tokens=2, prompts=6, seed=0)
    report, replies = evaluate("base", base, base, base, data, settings)
    assert report["generated_rows"] == 4
    assert len(replies["answers"]) == 4


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj"])
def test_reply_ends_with_the_learned_positions(kind: str) -> None:
    torch.manual_seed(0)
    limits = {"max_position_embeddings": 32}
    config = CONFIG_MAPPING[kind](**SHAPE | (BESIDES | OTHERS)[kind] | limits)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [list(range(5, 25)), list(range(5, 35))]
    replies = generate.generate(model, tiny.tokenizer(), prompts, [383], 64, CPU, torch.float32)
    assert len(replies) == 2
    assert not replies[0].stopped


def test_stop_token_ends_a_reply() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompt = tokenizer.encode("two")
    with torch.inference_mode():
        first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    [reply] = generate.generate(model, tokenizer, [prompt], [first], 8, CPU, torch.float32)
    assert reply == generate.Reply("", stopped=True)


def test_metrics_are_weighted_by_token_and_by_language() -> None:
    rows = pd.DataFrame(
        {
            "conversation_id": ["one", "one"],
            "nats": [2.0, 3.0],
            "tokens": [1, 4],
            "text_bytes": [4, 6],
            "language": ["en", None],
            "stopped": pd.array([True, False], dtype="boolean"),
            "correct": pd.array([True, None], dtype="boolean"),
        }
    )
    report = metrics(rows)
    assert (report["loss"], report["conversations"]) == (1.0, 1)
    assert report["perplexity"] == pytest.approx(math.e)
    assert report["bits_per_byte"] == pytest.approx(5 / math.log(2) / 10)
    assert (report["stop_rate"], report["exact_match"]) == (0.5, 1.0)
    assert (report["generated_rows"], report["answered_rows"]) == (2, 1)
    assert report["by_language"]["en"]["loss"] == 2.0
    assert report["by_language"]["other"]["exact_match"] is None
    assert sum(part["tokens"] for part in report["by_language"].values()) == report["tokens"]


def test_evaluation_repeats_to_the_byte(tmp_path: Path) -> None:
    base, data = tiny.save(tmp_path / "base"), tiny.prepared(tmp_path / "prepared")
    settings = Evaluate(generate_rows=4, max_new_tokens=4, prompts=6, seed=0)
    for name in ("one", "two"):
        report, replies = evaluate("base", base, base, base, data, settings)
        files.write_json(tmp_path / name, [report, replies])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert len(replies["answers"]) == 6
    assert report["generated_rows"] == 4
    assert report["conversations"] == 24
