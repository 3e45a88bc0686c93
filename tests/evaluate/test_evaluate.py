"""Answers and figures: chosen, generated, compared and summed up as stated."""

import math
from pathlib import Path

import pytest
import torch

from stages.evaluate import answers, metrics
from stages.evaluate.evaluation import evaluate
from stages.evaluate.settings import Evaluate
from stages.shared import files
from tests import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("48 + 17 = 65.\n65", "65", True),
        ("It is Monday.\nMONDAY. ", "Monday", True),
        ("one line, 65", "65", False),
        ("65\nand so it is", "65", False),
        ("a  b\u00a0c", "A B C", True),  # a no-break space is a space (NFKC)
        ("", "65", False),
        ("\n\n", "", False),
    ],
)
def test_exact_match_compares_the_normalized_last_line(
    reply: str, answer: str, right: bool
) -> None:
    assert answers.is_right(reply, answer) is right


def test_rows_with_an_answer_are_asked_first_in_a_seeded_order() -> None:
    has_answer = [False, True, False, True, True]
    chosen = answers.choose(has_answer, 4, seed=1)
    assert set(chosen[:3]) == {1, 3, 4}
    assert chosen == answers.choose(has_answer, 4, seed=1)
    assert len(answers.choose(has_answer, 99, seed=1)) == 5


def test_batched_replies_equal_those_asked_one_by_one_and_say_whether_they_stopped() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts = [tokenizer.encode(text) for text in ("two", "What is two plus two?", "is it")]
    together = answers.generate(model, tokenizer, prompts, [2], 8, CPU, torch.float32)
    for prompt, reply in zip(prompts, together, strict=True):
        assert answers.generate(model, tokenizer, [prompt], [2], 8, CPU, torch.float32) == [reply]
        ids = list(prompt)
        for _ in range(8):  # greedy, without a cache
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        assert reply.stopped == (ids[-1] == 2)
        assert reply.text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_a_stop_token_ends_a_reply() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompt = tokenizer.encode("two")
    with torch.inference_mode():
        first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    [reply] = answers.generate(model, tokenizer, [prompt], [first], 8, CPU, torch.float32)
    assert reply == answers.Reply("", stopped=True)


def test_figures_are_weighted_by_token_and_english_stands_apart() -> None:
    rows = [
        metrics.Row(nats=2.0, tokens=1, text_bytes=4, english=True, stopped=True, right=True),
        metrics.Row(nats=3.0, tokens=4, text_bytes=6, english=False, stopped=False, right=None),
    ]
    report = metrics.report(rows)
    assert report["loss"] == 1.0
    assert report["perplexity"] == pytest.approx(math.e)
    assert report["bits_per_byte"] == pytest.approx(5 / math.log(2) / 10)
    assert (report["stop_rate"], report["exact_match"], report["generated_rows"]) == (0.5, 1.0, 2)
    assert report["by_language"]["en"]["loss"] == 2.0
    assert report["by_language"]["other"]["exact_match"] is None
    assert sum(part["tokens"] for part in report["by_language"].values()) == report["tokens"]


def test_an_evaluation_repeats_itself_to_the_byte(tmp_path: Path) -> None:
    base, data = tiny.save(tmp_path / "base"), tiny.prepared(tmp_path / "prepared")
    wanted = Evaluate(generate_rows=4, max_new_tokens=4, prompts=6, seed=0)
    for name in ("one", "two"):
        figures, shown = evaluate("base", base, base, base, data, wanted)
        files.write_json(tmp_path / name, [figures, shown])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert len(shown["answers"]) == 6
    assert figures["generated_rows"] == 4
    assert figures["conversations"] == 24
