"""The mask on random and on real conversations: every end is supervised, no prompt is."""

import json
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.prepare.forms import parse
from stages.prepare.loss_mask import Example, ExampleEncoder, TrainOn
from stages.shared.chat import templates
from stages.shared.chat.conversation import Message
from tests import tiny, vocabularies
from tests.conversations import encode, random_conversation
from tests.prepare.checks import check
from tests.prepare.reading import PATTERNS, Reader
from tests.prepare.test_golden import OWN

TEMPLATES = ("chatml", "guanaco", "llama2", "tokenizer")
TOKENIZERS = {
    "tiny": (tiny.tokenizer, OWN),
    "plain": (
        vocabularies.plain,
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
        "{% elif m['role'] == 'user' %}User: {{ m['content'] }}\n\n"
        "{% else %}Assistant: {{ m['content'] + eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
    ),
    "spaced": (
        vocabularies.spaced,
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "<<SYS>>{{ m['content'] }}<</SYS>>{% elif m['role'] == 'user' %}"
        "[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] + eos_token }}"
        "{% endif %}{% endfor %}",
    ),
}
REAL = Path("../shared/data/conversations")
REAL_STEP = {"eval": 1, "train": 12}  # every row with a 1; that takes minutes


@cache
def made(name: str) -> tuple[PreTrainedTokenizerFast, Reader]:
    make, own = TOKENIZERS[name]
    tokenizer = make()
    tokenizer.chat_template = own
    return tokenizer, Reader(tokenizer, byte_level=name != "spaced")


def pattern_of(name: str, template: str) -> re.Pattern[bytes]:
    return PATTERNS[template + (f" ({name})" if template == "tokenizer" else "")]


def draw(name: str, *seed: str, count: int) -> list[list[Message]]:
    rng = random.Random(" ".join([name, *seed]))
    return [random_conversation(rng, ascii_only=name == "spaced") for _ in range(count)]


@pytest.mark.parametrize("train_on", get_args(TrainOn))
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_mask_holds_every_end_and_no_prompt(name: str, template: str, train_on: TrainOn) -> None:
    tokenizer, reader = made(name)
    made_template = templates.make(template, tokenizer)
    count = Counter[str]()
    for max_length in (12, 20, 30, 40, 60, 80, 120, 10_000):
        batch = draw(name, template, train_on, str(max_length), count=40)
        encoder = ExampleEncoder(tokenizer, made_template, train_on, max_length)
        for messages, one in zip(batch, encode(encoder, batch), strict=True):
            if not isinstance(one, Example):
                assert re.match("a message holds|no supervised token", str(one))
                continue
            pattern = pattern_of(name, template)
            ends = check(one, messages, reader, pattern, train_on, max_length)
            count.update(accepted=1, ends=ends, cut=one.truncated)
    assert min(count["accepted"], count["ends"]) > 80
    assert count["cut"] > 30


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_truncation_keeps_as_many_exchanges_as_fit(name: str, template: str) -> None:
    tokenizer, reader = made(name)
    batch = draw(name, template, count=30)
    made_template = templates.make(template, tokenizer)
    whole = encode(ExampleEncoder(tokenizer, made_template, "all", 10_000), batch)
    for max_length in (20, 40, 60, 80):
        cut = encode(ExampleEncoder(tokenizer, made_template, "all", max_length), batch)
        for one, uncut in zip(cut, whole, strict=True):
            if isinstance(one, Example) and isinstance(uncut, Example):
                turns = reader.turns(uncut, pattern_of(name, template))
                ends = [turn.end for turn in turns if turn.role == "assistant"]
                fit = sum(end is not None and end < max_length for end in ends)
                assert sum(m["role"] == "assistant" for m in one.messages) == max(1, fit)


@cache
def real() -> tuple[list[list[Message]], PreTrainedTokenizerFast]:
    """Conversations, and a tokenizer trained on them."""
    rows: list[dict[str, str]] = []
    for split, step in REAL_STEP.items():
        lines = (REAL / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[::step]
        rows += map(json.loads, lines)
    conversations = [parse(row, "guanaco").messages for row in rows]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((m["content"] for c in conversations[:259] for m in c), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=OWN
    )
    return conversations, tokenizer


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not there")
@pytest.mark.parametrize(("train_on", "max_length"), [("assistant", 8192), ("last", 512)])
@pytest.mark.parametrize("template", TEMPLATES)
def test_mask_of_real_conversations(template: str, train_on: TrainOn, max_length: int) -> None:
    conversations, tokenizer = real()
    assert len(conversations) > 700
    reader = Reader(tokenizer, byte_level=True)
    made_template = templates.make(template, tokenizer)
    encoder = ExampleEncoder(tokenizer, made_template, train_on, max_length)
    count = Counter[str]()
    for messages, one in zip(conversations, encode(encoder, conversations), strict=True):
        if not isinstance(one, Example):
            assert str(one) == f"no supervised token within prepare.max_length = {max_length}"
            continue
        ends = check(one, messages, reader, pattern_of("tiny", template), train_on, max_length)
        replies = sum(message["role"] == "assistant" for message in one.messages)
        count.update(accepted=1, replies=replies, ends=ends, cut=one.truncated)
    assert count["accepted"] >= 0.99 * len(conversations)
    if train_on == "assistant":  # nothing is cut: as many ends are supervised as there are replies
        assert count["cut"] == 0
        assert count["ends"] == count["replies"] > len(conversations)
