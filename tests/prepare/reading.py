r"""Reads prepared tokens back into turns, knowing nothing of how they were made.

Tokens become bytes, a control token one byte that UTF-8 never has: `\xff` the end of a turn, `\xfe`
the first of a text or turn, `\xfd` any other. So no message can hold one.
"""

import re
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stages.prepare.loss_mask import Example
from stages.shared.chat.conversation import Message, Role

# What stands between two ends of turns. Names in brackets: of a model's own chat template.
PATTERNS = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
        "chatml": rb"(?:\xfe|<\|im_start\|>)"
        rb"(?:system\n(?P<system>.*)|user\n(?P<user>.*)|assistant\n(?P<assistant>.*))",
        "guanaco": rb"(?:(?P<system>.*?)\n)??"
        rb"### Human: (?P<user>.*?)\n### Assistant: (?P<assistant>.*)",
        "llama2": rb"\xfe?\[INST\] (?:<<SYS>>\n(?P<system>.*?)\n<</SYS>>\n\n)?"
        rb"(?P<user>.*?) \[/INST\] (?P<assistant>.*?) ?",
        "tokenizer (tiny)": rb"\xfd\xfesystem\nfor|\xfd?\xfe"
        rb"(?:system\n(?P<system>.*)|user\n(?P<user>.*)|assistant\n(?P<assistant>.*))",
        "tokenizer (plain)": rb"(?:(?P<system>.*?)\n\n)??"
        rb"User: (?P<user>.*?)\n\nAssistant: (?P<assistant>.*)",
        "tokenizer (spaced)": rb"\xfe?(?:<<SYS>>(?P<system>.*?)<</SYS>>)?"
        rb"\[INST\] (?P<user>.*?) \[/INST\] (?P<assistant>.*)",
    }.items()
}
_ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """A message as it was read.

    Attributes:
        role: whose it is.
        content: its bytes.
        tokens: those that hold a byte of it.
        end: the token that ends the turn, or None where the text breaks off before it.
    """

    role: Role
    content: bytes
    tokens: range
    end: int | None

    @property
    def message(self) -> Message:
        """The message of a turn that is whole."""
        return {"role": self.role, "content": self.content.decode()}


class Reader:
    """Tokens of one tokenizer back into bytes and turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, byte_level: bool) -> None:
        self._control = {t for t, added in tokenizer.added_tokens_decoder.items() if added.special}
        kinds = {tokenizer.bos_token_id: b"\xfe", tokenizer.eos_token_id: b"\xff"}
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        self._bytes: list[bytes] = []
        self._text: list[bytes] = []
        for token, name in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
            if token in self._control:
                self._bytes.append(kinds.get(token, b"\xfd"))
                self._text.append(name.encode())
                continue
            plain = name.replace("▁", " ").encode()
            self._bytes.append(bytes(byte_of[c] for c in name) if byte_level else plain)
            self._text.append(self._bytes[-1])

    def text(self, one: Example) -> bytes:
        """What the tokens say, control tokens by name."""
        tokens = one.input_ids.tolist()
        return b"".join(self._text[token] for token in tokens)[self._added_space(one) :]

    def supervised(self, one: Example) -> np.ndarray:
        """Bytes of supervised tokens that are no control tokens, bool [bytes of `text`]."""
        tokens = one.input_ids.tolist()
        plain = np.array([token not in self._control for token in tokens])
        lengths = [len(self._text[token]) for token in tokens]
        return np.repeat(one.loss_mask & plain, lengths)[self._added_space(one) :]

    def turns(self, one: Example, pattern: re.Pattern[bytes]) -> list[Turn]:
        """The turns, in order; where the text breaks off, the last has no end.

        Args:
            one: tokens of this tokenizer.
            pattern: of `PATTERNS`.
        """
        pieces = [self._bytes[token] for token in one.input_ids.tolist()]
        owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces]).tolist()
        stream, turns, at = b"".join(pieces), list[Turn](), self._added_space(one)
        while at < len(stream):
            end = stream.find(b"\xff", at)
            stop = len(stream) if end < 0 else end
            found = pattern.fullmatch(stream, at, stop)
            if found is None:
                assert end < 0, stream[at:stop]  # only a text that breaks off may be of no form
                break
            roles = [role for role in _ROLES if found[role] is not None]
            for role in roles:
                first, last = found.span(role)
                tokens = range(owner[first], owner[last - 1] + 1) if first < last else range(0)
                closes = role == roles[-1] and end >= 0
                turns.append(Turn(role, found[role], tokens, owner[end] if closes else None))
            at = stop + 1 + stream.startswith(b"\n", stop + 1)
        return turns

    def _added_space(self, one: Example) -> int:
        """Some tokenizers put a space before a text's first word."""
        return int(self._text[one.input_ids[0]].startswith(b" ") and not one.text.startswith(" "))
