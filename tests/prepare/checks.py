"""What has to be true of every conversation that `prepare` accepts."""

import re

import numpy as np

from stages.prepare.loss_mask import Example, TrainOn
from stages.shared.chat.conversation import Message
from tests.prepare.reading import Reader, Turn


def check(
    one: Example,
    given: list[Message],
    reader: Reader,
    pattern: re.Pattern[bytes],
    train_on: TrainOn,
    max_length: int,
) -> int:
    """Read a conversation back and hold its messages, mask and figures against it.

    Returns:
        How many ends of replies are supervised.
    """
    mask = one.loss_mask
    turns = reader.turns(one, pattern)
    replies = [turn for turn in turns if turn.role == "assistant"]
    assert len(mask) == len(one.input_ids) <= max_length
    assert not mask[0]
    if train_on == "all":
        assert np.all(mask[1:])
    else:  # a selected reply is supervised with its end, if it has one; no other message is
        selected = replies if train_on == "assistant" else replies[-1:]
        for turn in turns:
            assert np.all(mask[turn.tokens] == (turn in selected)), turn
        for turn in replies:
            assert turn.end is None or mask[turn.end] == (turn in selected), turn
    _check_messages(one, given, turns)
    if len(turns) < len(one.messages) or turns[-1].end is None:
        # It breaks off. Only the first exchange is ever cut: in its reply, or with `all` before it.
        assert one.truncated
        assert len(mask) == max_length
        assert sum(message["role"] == "assistant" for message in one.messages) == 1
        assert replies or train_on == "all"
    _check_text(one, reader)
    return sum(bool(mask[turn.end]) for turn in replies if turn.end is not None)


def _check_messages(one: Example, given: list[Message], turns: list[Turn]) -> None:
    """The messages are the first of those given, and what the tokens say, to where they end."""
    assert one.messages == given[: len(one.messages)]
    assert one.truncated or len(one.messages) == len(given)
    assert [turn.role for turn in turns] == [m["role"] for m in one.messages[: len(turns)]]
    for at, (turn, message) in enumerate(zip(turns, one.messages, strict=False)):
        content = message["content"].encode()
        if at == len(turns) - 1 and turn.end is None:
            assert content.startswith(turn.content.rstrip())
        else:
            assert turn.content == content


def _check_text(one: Example, reader: Reader) -> None:
    """The text is what the tokens say, with all of a character that a cut goes through."""
    text, said = one.text.encode(), reader.text(one)
    assert text.startswith(said)
    assert len(text) - len(said) <= (3 if one.truncated else 0)
    assert one.text_bytes == reader.supervised(one).sum()
