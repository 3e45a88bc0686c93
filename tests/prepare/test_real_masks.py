"""The mask on real conversations, with a tokenizer trained on them."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.prepare.loss_mask import ExampleEncoder, TrainOn
from stages.prepare.parsing import Conversation, parse
from stages.prepare.rows import Row
from stages.shared.chat import templates
from stages.shared.chat.conversation import RejectedRow
from tests.prepare.checks import check
from tests.prepare.reading import PATTERNS, Reader
from tests.prepare.test_golden import OWN

REAL = Path("../shared/data/conversations")
STEP = {"eval": 1, "train": 12}  # every row with a 1; that takes minutes


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    if not REAL.exists():
        pytest.skip(f"{REAL} is not there")
    rows: list[Row] = []
    for split, step in STEP.items():
        lines = (REAL / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[::step]
        rows += [Row(number, json.loads(line), None, 0) for number, line in enumerate(lines)]
    assert len(rows) > 700
    return [parse(row, "guanaco") for row in rows]


@pytest.fixture(scope="module")
def tokenizer(conversations: list[Conversation]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    some = (m["content"] for c in conversations[:259] for m in c.messages)
    bpe.train_from_iterator(some, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=OWN,
    )


@pytest.mark.parametrize(("train_on", "max_length"), [("assistant", 8192), ("last", 512)])
@pytest.mark.parametrize("template", ["chatml", "guanaco", "llama2", "tokenizer"])
def test_every_end_is_learnt_and_no_prompt(
    template: str,
    train_on: TrainOn,
    max_length: int,
    conversations: list[Conversation],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    pattern = PATTERNS["tokenizer (tiny)" if template == "tokenizer" else template]
    reader = Reader(tokenizer, byte_level=True)
    made = templates.make(template, tokenizer)
    encoder = ExampleEncoder(tokenizer, made, train_on, max_length)
    count = Counter[str]()
    given = [conversation.messages for conversation in conversations]
    for messages, one in zip(given, encoder.encode(given), strict=True):
        if isinstance(one, RejectedRow):
            assert str(one) == f"no supervised token within prepare.max_length = {max_length}"
            continue
        ends = check(one, messages, reader, pattern, train_on, max_length)
        replies = sum(message["role"] == "assistant" for message in one.messages)
        count.update(accepted=1, replies=replies, ends=ends, cut=one.truncated)
    print(f"{template} {train_on} {max_length}: {dict(count)}")
    assert count["accepted"] >= 0.99 * len(given)
    if train_on == "assistant":  # nothing is cut: as many ends are learnt as there are replies
        assert count["cut"] == 0
        assert count["ends"] == count["replies"] > len(given)
