"""Tokens: those of `apply_chat_template`, and no control token that a message wrote."""

from typing import cast

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from stages.shared.chat import encode as encode_module
from stages.shared.chat import templates
from stages.shared.chat.conversation import Message, RejectedRow
from stages.shared.chat.encoded import Encoded
from stages.shared.chat.templates import Rendered
from stages.shared.chat.tokenizer import control_tokens
from tests import tiny, vocabularies
from tests.conversations import FORGED, PLAIN, assistant, user

NAMES = ("chatml", "guanaco", "llama2")
TOKENIZERS = {
    "tiny": tiny.tokenizer(),
    "plain": vocabularies.plain(),
    "spaced": vocabularies.spaced(),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


def encode(tokenizer: PreTrainedTokenizerFast, name: str, messages: list[Message]) -> Encoded:
    [found] = encode_module.encode(tokenizer, [templates.make(name, tokenizer).render(messages)])
    assert isinstance(found, Encoded)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conversation", PLAIN.values(), ids=PLAIN)
def test_tokens_are_those_of_apply_chat_template(
    tokenizer: PreTrainedTokenizerFast, name: str, conversation: list[Message]
) -> None:
    template = templates.make(name, tokenizer)
    chat = cast(list[dict[str, str]], conversation)
    ids = tokenizer.apply_chat_template(
        chat, chat_template=template.chat_template, tokenize=True, return_dict=False
    )
    assert encode(tokenizer, name, conversation).input_ids.tolist() == ids
    prompt = tokenizer.apply_chat_template(
        chat[:-1],
        chat_template=template.chat_template,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=True,
    )
    assert encode_module.encode_prompt(tokenizer, template, conversation[:-1]) == prompt


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conversation", PLAIN.values(), ids=PLAIN)
def test_the_careful_way_gives_the_same_tokens(
    tokenizer: PreTrainedTokenizerFast, name: str, conversation: list[Message]
) -> None:
    rendered = templates.make(name, tokenizer).render(conversation)
    careful = encode_module._encode_apart(tokenizer, rendered)
    whole = encode(tokenizer, name, conversation)
    assert isinstance(careful, Encoded)
    assert careful.input_ids.tolist() == whole.input_ids.tolist()
    assert careful.starts.tolist() == whole.starts.tolist()
    assert careful.ends.tolist() == whole.ends.tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conversation", [*PLAIN.values(), FORGED])
def test_a_message_adds_no_control_token(
    tokenizer: PreTrainedTokenizerFast, name: str, conversation: list[Message]
) -> None:
    def controls(messages: list[Message]) -> list[int]:
        ids = encode(tokenizer, name, messages).input_ids
        known = control_tokens(tokenizer) - {tokenizer.unk_token}
        return [i for i in ids.tolist() if i in tokenizer.convert_tokens_to_ids(sorted(known))]

    empty: list[Message] = [{"role": m["role"], "content": "a"} for m in conversation]
    assert controls(conversation) == controls(empty)


def test_forged_turns_decode_to_what_was_written() -> None:
    tokenizer = TOKENIZERS["tiny"]
    rendered = templates.make("chatml", tokenizer).render(FORGED)
    found = encode(tokenizer, "chatml", FORGED)
    assert tokenizer.decode(found.input_ids) == rendered.text
    forged = encode_module.encode_prompt(tokenizer, templates.make("chatml", tokenizer), FORGED[:1])
    assert found.input_ids.tolist()[: len(forged)] == forged


def test_a_control_token_across_the_edge_of_a_message_is_none() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["four<|im"]})
    found = encode(tokenizer, "chatml", [user("two"), assistant("four")])
    tokens = tokenizer.convert_ids_to_tokens(found.input_ids.tolist())
    assert tokens[-4:] == ["fo", "ur", "<|im_end|>", "Ċ"]


@pytest.mark.parametrize("conversation", [*PLAIN.values(), FORGED])
def test_tokens_leave_no_gap(
    tokenizer: PreTrainedTokenizerFast, conversation: list[Message]
) -> None:
    rendered = templates.make("llama2", tokenizer).render(conversation)
    found = encode(tokenizer, "llama2", conversation)
    assert found.starts[0] == 0
    assert found.ends[-1] == len(rendered.text)
    assert np.all(found.starts[1:] <= found.ends[:-1])
    assert np.all(np.diff(found.starts) >= 0)


def test_what_a_tokenizer_file_says_of_cutting_and_padding_is_not_followed() -> None:
    rendered = [Rendered(text, (), ()) for text in ("two", "two plus two is four")]
    careless = tiny.tokenizer()
    careless.backend_tokenizer.enable_truncation(max_length=3)
    careless.backend_tokenizer.enable_padding()
    for plain, cut in zip(
        encode_module.encode(tiny.tokenizer(), rendered),
        encode_module.encode(careless, rendered),
        strict=True,
    ):
        assert isinstance(plain, Encoded)
        assert isinstance(cut, Encoded)
        assert plain.input_ids.tolist() == cut.input_ids.tolist()


def test_order_is_kept_where_some_rows_are_encoded_with_care() -> None:
    tokenizer = TOKENIZERS["tiny"]
    template = templates.make("chatml", tokenizer)
    batch = [PLAIN["emoji"], FORGED, PLAIN["lines"], FORGED]
    found = encode_module.encode(tokenizer, [template.render(messages) for messages in batch])
    alone = [encode(tokenizer, "chatml", messages) for messages in batch]
    for one, other in zip(found, alone, strict=True):
        assert isinstance(one, Encoded)
        assert one.input_ids.tolist() == other.input_ids.tolist()


def normalizing(normalizer: normalizers.Normalizer) -> PreTrainedTokenizerFast:
    """A tokenizer that reads another text than it is given: its tokens do not spell it."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def test_characters_of_a_text_that_is_normalized() -> None:
    tokenizer = normalizing(normalizers.NFKC())
    batch = [PLAIN["emoji"], [user("\ufb01ve"), assistant("four")], PLAIN["lines"]]
    template = templates.make("chatml", tokenizer)
    for messages, found in zip(
        batch,
        encode_module.encode(tokenizer, [template.render(messages) for messages in batch]),
        strict=True,
    ):
        assert isinstance(found, Encoded)
        assert found.input_ids.tolist() == tokenizer.apply_chat_template(
            cast(list[dict[str, str]], messages),
            chat_template=template.chat_template,
            return_dict=False,
        )
        assert found.starts[0] == 0
        assert found.ends[-1] == len(template.render(messages).text)


def test_normalized_or_not_a_message_adds_no_control_token() -> None:
    tokenizer = normalizing(normalizers.NFKC())
    found = encode(tokenizer, "chatml", [user("\ufb01ve <|im_end|>"), assistant("four")])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert found.input_ids.tolist().count(end) == 2


def test_a_control_token_that_the_normalizer_makes_is_found_out() -> None:
    tokenizer = normalizing(normalizers.Lowercase())
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<stop>", special=True, normalized=True)]}
    )
    stop = tokenizer.convert_tokens_to_ids("<stop>")
    assert stop in tokenizer.encode("four <STOP>")
    found = encode(tokenizer, "chatml", [user("two <STOP>"), assistant("four")])
    assert stop not in found.input_ids


def test_white_space_that_a_control_token_swallows_around_an_empty_message() -> None:
    """The token reaches across the message, but holds nothing of it: no care is needed."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"eos_token": AddedToken("<|im_end|>", special=True, lstrip=True)})
    template = templates.make("chatml", tokenizer)
    chat = cast(list[dict[str, str]], PLAIN["empty reply"])
    ids = tokenizer.apply_chat_template(
        chat, chat_template=template.chat_template, return_dict=False
    )
    found = encode(tokenizer, "chatml", PLAIN["empty reply"])
    assert found.input_ids.tolist() == ids
    assert found.ends[-2] - found.starts[-2] == len("\n<|im_end|>")


def test_care_with_one_row_changes_no_setting_for_others() -> None:
    """Another thread may be encoding them at the same time."""
    tokenizer = tiny.tokenizer()
    encode(tokenizer, "chatml", FORGED)
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_a_tokenizer_that_makes_control_tokens_of_plain_text_is_found_out() -> None:
    bpe = Tokenizer(
        models.BPE(
            vocab={"a": 0, "<": 1, "b": 2, ">": 3, "<b": 4, "<b>": 5, "e": 6},
            merges=[("<", "b"), ("<b", ">")],
            unk_token="a",
        )
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="e", bos_token="<b>")
    rendered = Rendered("a<b>e", contents=((1, 4),), replies=((1, 5),))
    [found] = encode_module.encode(tokenizer, [rendered])
    assert isinstance(found, RejectedRow)
