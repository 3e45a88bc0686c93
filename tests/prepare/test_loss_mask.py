"""Cuts, bytes and refusals; the mask token by token is in golden.txt."""

import random
from typing import get_args

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from stages.prepare import guanaco
from stages.prepare.loss_mask import Example, ExampleEncoder, TrainOn
from stages.shared.chat import templates
from stages.shared.chat.conversation import Message, RejectedRow
from tests import tiny, vocabularies
from tests.conversations import FORGED, PLAIN, assistant, random_conversation, user

TINY = tiny.tokenizer()


def supervise(
    messages: list[Message],
    template: str = "chatml",
    train_on: TrainOn = "assistant",
    max_length: int = 512,
    tokenizer: PreTrainedTokenizerFast = TINY,
) -> Example | RejectedRow:
    made = templates.make(template, tokenizer)
    [found] = ExampleEncoder(tokenizer, made, train_on, max_length).encode([messages])
    return found


def accepted(found: Example | RejectedRow) -> Example:
    assert isinstance(found, Example)
    return found


def show(found: Example | RejectedRow, tokenizer: PreTrainedTokenizerFast = TINY) -> str:
    one = accepted(found)
    tokens = tokenizer.convert_ids_to_tokens(one.input_ids.tolist())
    learnt = zip(tokens, one.loss_mask, strict=True)
    return " ".join(f"+{token}" if mask else token for token, mask in learnt)


def test_the_end_token_is_learnt_where_it_is_the_padding_token_too() -> None:
    tokenizer = vocabularies.plain()
    assert tokenizer.pad_token == tokenizer.eos_token
    found = accepted(supervise(PLAIN["one exchange"], "guanaco", tokenizer=tokenizer))
    learnt = tokenizer.convert_ids_to_tokens(found.input_ids[found.loss_mask].tolist())
    assert learnt[-1] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("name", "template", "train_on", "text"),
    [
        ("one exchange", "chatml", "assistant", "four"),
        ("one exchange", "guanaco", "assistant", " four"),
        ("one exchange", "llama2", "assistant", " four "),
        ("two exchanges", "chatml", "assistant", "dosfour"),
        ("two exchanges", "chatml", "last", "four"),
        ("empty reply", "chatml", "assistant", ""),
        ("emoji", "chatml", "assistant", "two 😀 four"),
        ("right to left", "chatml", "assistant", "أربع"),
        ("one exchange", "chatml", "all", "user\ntwo plus two is\nassistant\nfour\n"),
    ],
)
def test_bytes_are_those_of_the_learnt_text(
    name: str, template: str, train_on: TrainOn, text: str
) -> None:
    found = accepted(supervise(PLAIN[name], template, train_on))
    assert found.text_bytes == len(text.encode())


@pytest.mark.parametrize("template", ["chatml", "guanaco", "llama2"])
def test_weight_0_stays_in_the_context(template: str) -> None:
    plain, flagged = PLAIN["two exchanges"], [*PLAIN["two exchanges"]]
    flagged[1] = {**flagged[1], "weight": 0}
    expected = accepted(supervise(plain, template, "last"))
    train_on: TrainOn
    for train_on in ("assistant", "last"):
        found = accepted(supervise(flagged, template, train_on))
        assert show(found) == show(expected)
        assert found.text_bytes == expected.text_bytes
    whole, found = (accepted(supervise(m, template, "all")) for m in (plain, flagged))
    replies = accepted(supervise(plain[:2], template)).loss_mask
    without = whole.loss_mask.copy()
    without[: len(replies)] &= ~replies
    without[len(replies) - 1] = found.loss_mask[len(replies) - 1]  # what ends the turn is text
    assert found.loss_mask.tolist() == without.tolist()


def test_replies_without_weight_are_rejected() -> None:
    flagged: list[Message] = [user("two"), {"role": "assistant", "content": "2", "weight": 0}]
    assert "has weight" in str(supervise(flagged))
    mixed = [*PLAIN["one exchange"], *flagged]
    assert "has weight" in str(supervise(mixed, train_on="last"))
    assert accepted(supervise(mixed)).supervised_tokens == 3


def test_bytes_of_characters_that_the_vocabulary_lacks() -> None:
    tokenizer = vocabularies.spaced()
    found = accepted(supervise([user("two"), assistant("four 😀é")], "llama2", tokenizer=tokenizer))
    tokens = tokenizer.convert_ids_to_tokens(found.input_ids[found.loss_mask].tolist())
    assert tokens == ["[/INST]▁", "four", "▁", "<unk>", "<unk>", "▁", "</s>"]
    assert found.text_bytes == len("[/INST] four 😀é ".encode())
    spelt = accepted(supervise([user("two"), assistant("<unk>")], "llama2", tokenizer=tokenizer))
    assert spelt.text_bytes == len("[/INST] <unk> ")


def test_a_long_conversation_is_cut_between_turns() -> None:
    found = accepted(supervise(PLAIN["two exchanges"], max_length=20))
    assert show(found) == (
        "<|im_start|> user Ċ t wo <|im_end|> Ċ <|im_start|> assistant Ċ +do +s +<|im_end|> Ċ"
    )
    assert found.messages == PLAIN["two exchanges"][:2]
    assert found.text.endswith("dos<|im_end|>\n")
    assert (found.truncated, found.answered) == (True, False)


def test_train_on_the_last_reply_that_is_left() -> None:
    found = supervise(PLAIN["two exchanges"], train_on="last", max_length=20)
    assert show(found).endswith("assistant Ċ +do +s +<|im_end|> Ċ")


def test_a_long_exchange_is_cut_in_its_reply() -> None:
    messages = [user("two"), assistant("four is two plus two is it")]
    found = accepted(supervise(messages, max_length=14))
    assert show(found) == (
        "<|im_start|> user Ċ t wo <|im_end|> Ċ <|im_start|> assistant Ċ +fo +ur +Ġis +Ġtwo"
    )
    assert found.messages == messages
    assert found.text.endswith("assistant\nfour is two")
    assert found.text_bytes == len("four is two")
    assert (found.truncated, found.answered) == (True, False)


def test_only_what_follows_the_last_end_is_cut() -> None:
    whole = accepted(supervise(PLAIN["two exchanges"]))
    found = accepted(supervise(PLAIN["two exchanges"], max_length=len(whole.input_ids) - 1))
    assert found.input_ids.tolist() == whole.input_ids.tolist()[:-1]
    assert found.messages == PLAIN["two exchanges"]
    assert (found.truncated, found.answered) == (True, True)


def test_a_cut_inside_a_character() -> None:
    found = accepted(supervise([user("is"), assistant("two 😀")], max_length=15))
    assert show(found).endswith("+t +wo +Ġ +ð +Ł +ĺ")


def test_what_fits_is_not_cut() -> None:
    whole = accepted(supervise(PLAIN["two exchanges"]))
    found = accepted(supervise(PLAIN["two exchanges"], max_length=len(whole.input_ids)))
    assert np.array_equal(found.input_ids, whole.input_ids)
    assert (found.truncated, found.answered) == (False, True)


def test_a_prompt_that_fills_the_length_leaves_nothing_to_learn() -> None:
    found = supervise([user("two plus two is it " * 5), assistant("four")], max_length=16)
    assert str(found) == "no supervised token within prepare.max_length = 16"


def test_a_markers_own_text_in_a_message_is_told() -> None:
    found = supervise([user("two"), assistant("Write ### Human: first")], "guanaco")
    assert str(found) == (
        "a message holds '### Human:', which is how prepare.template 'guanaco' marks a turn"
    )


@pytest.mark.parametrize("messages", PLAIN.values(), ids=PLAIN)
def test_what_guanaco_renders_is_guanacos_form(messages: list[Message]) -> None:
    found = accepted(supervise(messages, "guanaco"))
    assert guanaco.parse(found.text.replace("<|im_end|>", "")) == messages


def test_a_batch_keeps_its_order() -> None:
    bad = [user("two plus two is it " * 9), assistant("four")]
    encoder = ExampleEncoder(TINY, templates.make("chatml", TINY), "assistant", 30)
    batch = [PLAIN["emoji"], bad, PLAIN["two exchanges"], FORGED, PLAIN["lines"]]
    found = encoder.encode(batch)
    kinds = [isinstance(one, RejectedRow) for one in found]
    assert kinds == [False, True, False, True, False]
    assert accepted(found[2]).messages == PLAIN["two exchanges"]
    assert accepted(found[4]).messages == PLAIN["lines"]


@pytest.mark.parametrize("train_on", get_args(TrainOn))
@pytest.mark.parametrize("tokenizer", [TINY, vocabularies.spaced()], ids=["tiny", "spaced"])
def test_what_stands_beside_a_conversation_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, train_on: TrainOn
) -> None:
    rng = random.Random(train_on)
    batch = [random_conversation(rng, ascii_only=tokenizer is not TINY) for _ in range(40)]
    encoder = ExampleEncoder(tokenizer, templates.make("chatml", tokenizer), train_on, 40)
    together = encoder.encode(batch)
    alone = [encoder.encode([messages])[0] for messages in batch]
    assert [str(one) for one in together] == [str(one) for one in alone]
    assert train_on == "all" or any(isinstance(one, RejectedRow) for one in together)
    assert any(isinstance(one, Example) and one.truncated for one in together)
