"""What tokens spell against what the tokenizer itself says of their characters."""

import random

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from stages.shared.chat import spelling, templates
from stages.shared.chat.spelling import Spelling
from tests import tiny, vocabularies
from tests.conversations import PLAIN, random_conversation

BYTE_LEVEL = {"tiny": tiny.tokenizer(), "plain": vocabularies.plain()}


def found(tokenizer: PreTrainedTokenizerFast) -> Spelling:
    one = spelling.of(tokenizer.backend_tokenizer)
    assert one is not None
    return one


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_characters_are_those_that_the_tokenizer_tells(name: str) -> None:
    tokenizer, draw = BYTE_LEVEL[name], random.Random(name)
    template = templates.make("chatml", tokenizer)
    batch = [*PLAIN.values(), *(random_conversation(draw) for _ in range(100))]
    texts = [template.render(messages).text for messages in batch]
    asked = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    read = found(tokenizer).read([one.ids for one in asked], texts)
    for one, told in zip(read, asked, strict=True):
        assert one is not None
        assert one.input_ids.tolist() == told.ids
        assert list(zip(one.starts.tolist(), one.ends.tolist(), strict=True)) == told.offsets
        assert (one.input_ids.dtype, one.starts.dtype, one.ends.dtype) == (np.int32,) * 3


def test_what_the_tokens_do_not_spell_is_not_read() -> None:
    tokenizer = BYTE_LEVEL["tiny"]
    texts = ["two é", "two", "", "zwei 😀"]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    spelt = found(tokenizer)
    assert None not in spelt.read(ids, texts)
    changed = spelt.read(ids, ["two è", "two ", "", "zwei 😀"])
    assert [one is None for one in changed] == [True, True, False, False]
    # What goes wrong in one text moves nothing in the next.
    last = changed[-1]
    assert last is not None
    assert last.ends[-1] == len("zwei 😀")
    assert spelt.read([], []) == []


def test_a_normalizer_makes_no_difference_to_texts_that_it_leaves_alone() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    texts = ["caf\u00e9", "cafe\u0301"]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert ids[0] == ids[1]
    same, other = found(tokenizer).read(ids, texts)
    assert same is not None
    assert other is None


def test_a_token_that_is_added_later_is_known() -> None:
    tokenizer = tiny.tokenizer()
    assert found(tokenizer) is found(tokenizer)
    tokenizer.add_tokens(["four!"])
    [one] = found(tokenizer).read([tokenizer.encode("two four!")], ["two four!"])
    assert one is not None
    assert one.starts.tolist()[-1] == len("two ")


def test_tokens_of_another_kind_spell_nothing() -> None:
    assert spelling.of(vocabularies.spaced().backend_tokenizer) is None
