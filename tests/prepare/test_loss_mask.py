"""Truncation, weights and bytes; the mask token by token is in golden.txt."""

import pytest
from transformers import PreTrainedTokenizerFast

from stages.prepare.loss_mask import Example, ExampleEncoder, TrainOn
from stages.shared.chat import templates
from stages.shared.chat.conversation import Conversation, Message, RejectedRow
from tests import tiny, vocabularies
from tests.conversations import PLAIN, assistant, user

TINY = tiny.tokenizer()


def encode(
    messages: list[Message],
    template: str = "chatml",
    train_on: TrainOn = "assistant",
    max_length: int = 512,
    tokenizer: PreTrainedTokenizerFast = TINY,
) -> Example:
    encoder = ExampleEncoder(tokenizer, templates.make(template, tokenizer), train_on, max_length)
    return encoder.encode(Conversation(messages))[0]


def show(one: Example) -> str:
    tokens = TINY.convert_ids_to_tokens(one.input_ids.tolist())
    marked = zip(tokens, one.loss_mask, strict=True)
    return " ".join(f"+{token}" if mask else token for token, mask in marked)


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
def test_text_bytes_are_of_the_supervised_text(
    name: str, template: str, train_on: TrainOn, text: str
) -> None:
    assert encode(PLAIN[name], template, train_on).text_bytes == len(text.encode())


def test_text_bytes_count_characters_that_the_vocabulary_lacks() -> None:
    tokenizer = vocabularies.spaced()
    for reply, names in (("four 😀é", ["four", "▁", "<unk>", "<unk>"]), ("<unk>", None)):
        one = encode([user("two"), assistant(reply)], "llama2", tokenizer=tokenizer)
        supervised = tokenizer.convert_ids_to_tokens(one.input_ids[one.loss_mask].tolist())
        assert one.text_bytes == len(f"[/INST] {reply} ".encode())
        assert names is None or supervised == ["[/INST]▁", *names, "▁", "</s>"]


def test_text_bytes_of_a_character_that_a_cut_divides() -> None:
    messages = [user("two"), assistant("😀")]
    prompt = int(encode(messages).loss_mask.argmax())
    lengths = range(prompt + 1, prompt + 5)
    assert [encode(messages, max_length=n).text_bytes for n in lengths] == [1, 2, 3, 4]


def test_text_bytes_of_parts_add_up_to_those_of_the_text() -> None:
    text = "two 😀é" * 20
    encoder = ExampleEncoder(TINY, templates.make("chatml", TINY), "all", 10)
    parts = encoder.encode(Conversation([], text=text))
    first = sum(len(TINY.convert_ids_to_tokens(int(one.input_ids[0]))) for one in parts)
    assert sum(one.text_bytes for one in parts) == len(text.encode()) - first


@pytest.mark.parametrize("template", ["chatml", "guanaco", "llama2"])
def test_weight_0_stays_in_the_context(template: str) -> None:
    plain, flagged = PLAIN["two exchanges"], [*PLAIN["two exchanges"]]
    flagged[1] = {**flagged[1], "weight": 0}
    expected = encode(plain, template, "last")
    train_on: TrainOn
    for train_on in ("assistant", "last"):
        one = encode(flagged, template, train_on)
        assert show(one) == show(expected)
        assert one.text_bytes == expected.text_bytes
    whole, one = (encode(messages, template, "all") for messages in (plain, flagged))
    replies = encode(plain[:2], template).loss_mask
    without = whole.loss_mask.copy()
    without[: len(replies)] &= ~replies
    without[len(replies) - 1] = one.loss_mask[len(replies) - 1]  # white space of the template
    assert one.loss_mask.tolist() == without.tolist()


def test_replies_without_weight_are_rejected() -> None:
    flagged: list[Message] = [user("two"), {"role": "assistant", "content": "2", "weight": 0}]
    mixed = [*PLAIN["one exchange"], *flagged]
    with pytest.raises(RejectedRow, match="has weight"):
        encode(flagged)
    with pytest.raises(RejectedRow, match="has weight"):
        encode(mixed, train_on="last")
    assert encode(mixed).supervised_tokens == 3


LONG = [user("two"), assistant("four is two plus two is it")]
FIRST = "<|im_start|> user Ċ t wo <|im_end|> Ċ <|im_start|> assistant Ċ"
WHOLE = encode(PLAIN["two exchanges"])


@pytest.mark.parametrize(
    ("messages", "max_length", "shown", "text", "kept", "answered"),
    [
        (PLAIN["two exchanges"], len(WHOLE.input_ids), show(WHOLE), WHOLE.text, 4, True),
        # Only white space after the last end is cut.
        (
            PLAIN["two exchanges"],
            len(WHOLE.input_ids) - 1,
            show(WHOLE)[:-2],
            WHOLE.text[:-1],
            4,
            True,
        ),
        # Between turns.
        (PLAIN["two exchanges"], 20, f"{FIRST} +do +s +<|im_end|> Ċ", "dos<|im_end|>\n", 2, False),
        # In a reply, and in a character of it.
        (LONG, 14, f"{FIRST} +fo +ur +Ġis +Ġtwo", "assistant\nfour is two", 2, False),
        ([user("two"), assistant("two 😀")], 16, f"{FIRST} +t +wo +Ġ +ð +Ł +ĺ", "two 😀", 2, False),
    ],
)
def test_truncation(
    messages: list[Message], max_length: int, shown: str, text: str, kept: int, answered: bool
) -> None:
    one = encode(messages, max_length=max_length)
    assert show(one) == shown
    assert one.text.endswith(text)
    assert one.messages == messages[:kept]
    assert (one.truncated, one.answered) == (max_length < len(WHOLE.input_ids), answered)


def test_prompt_that_fills_the_length_is_rejected() -> None:
    with pytest.raises(RejectedRow, match=r"no supervised token within prepare\.max_length = 16"):
        encode([user("two plus two is it " * 5), assistant("four")], max_length=16)
