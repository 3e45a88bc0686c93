"""The mask on many random conversations, and on real ones: every end is learnt, no prompt is."""

import random
import re
from collections import Counter
from functools import cache
from typing import get_args

import pytest
from transformers import PreTrainedTokenizerFast

from stages.prepare.loss_mask import ExampleEncoder, TrainOn
from stages.shared.chat import templates
from stages.shared.chat.conversation import RejectedRow
from tests import tiny, vocabularies
from tests.conversations import random_conversation
from tests.prepare.checks import check
from tests.prepare.reading import PATTERNS, Reader
from tests.prepare.test_golden import OWN

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


@cache
def made(name: str) -> tuple[PreTrainedTokenizerFast, Reader]:
    make, own = TOKENIZERS[name]
    tokenizer = make()
    tokenizer.chat_template = own
    return tokenizer, Reader(tokenizer, byte_level=name != "spaced")


@pytest.mark.parametrize("train_on", get_args(TrainOn))
@pytest.mark.parametrize("template", ["chatml", "guanaco", "llama2", "tokenizer"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_end_is_learnt_and_no_prompt(name: str, template: str, train_on: TrainOn) -> None:
    tokenizer, reader = made(name)
    own = f" ({name})" if template == "tokenizer" else ""
    rng = random.Random(f"{name} {template} {train_on}")
    made_template = templates.make(template, tokenizer)
    count = Counter[str]()
    for max_length in (12, 20, 30, 40, 60, 80, 120, 10_000):
        batch = [random_conversation(rng, ascii_only=name == "spaced") for _ in range(40)]
        encoder = ExampleEncoder(tokenizer, made_template, train_on, max_length)
        for given, one in zip(batch, encoder.encode(batch), strict=True):
            if isinstance(one, RejectedRow):
                assert re.match("a message holds|no supervised token", str(one))
                continue
            ends = check(one, given, reader, PATTERNS[template + own], train_on, max_length)
            count.update(accepted=1, ends=ends, cut=one.truncated)
    print(f"{name} {template} {train_on}: {dict(count)}")
    assert min(count["accepted"], count["ends"]) > 80
    assert count["cut"] > 30


@pytest.mark.parametrize("template", ["chatml", "guanaco", "llama2", "tokenizer"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_as_many_exchanges_are_kept_as_fit(name: str, template: str) -> None:
    tokenizer, reader = made(name)
    pattern = PATTERNS[template + (f" ({name})" if template == "tokenizer" else "")]
    rng = random.Random(f"{name} {template}")
    batch = [random_conversation(rng, ascii_only=name == "spaced") for _ in range(30)]
    made_template = templates.make(template, tokenizer)
    whole = ExampleEncoder(tokenizer, made_template, "all", 10_000).encode(batch)
    for max_length in (20, 40, 60, 80):
        found = ExampleEncoder(tokenizer, made_template, "all", max_length).encode(batch)
        for one, all_of_it in zip(found, whole, strict=True):
            if isinstance(one, RejectedRow) or isinstance(all_of_it, RejectedRow):
                continue
            turns = reader.turns(all_of_it, pattern)
            ends = [turn.end for turn in turns if turn.role == "assistant"]
            fit = sum(end is not None and end < max_length for end in ends)
            assert sum(m["role"] == "assistant" for m in one.messages) == max(1, fit)
