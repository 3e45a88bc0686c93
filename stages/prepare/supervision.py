"""Which tokens are learnt, and what is kept of a conversation that is too long."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from stages.prepare import masks
from stages.shared.chat import encode
from stages.shared.chat.conversation import Message, RejectedRow
from stages.shared.chat.encoded import Encoded, join
from stages.shared.chat.templates import Rendered, Span, Template

T = TypeVar("T")
TrainOn = Literal["assistant", "last", "all"]


class Supervised(NamedTuple):
    """A conversation as it is trained on.

    Attributes:
        messages: whole exchanges; of a single one that is too long, all of it.
        text: what the tokens stand for.
        input_ids: int32 [tokens], at most `max_length`.
        loss_mask: bool [tokens], whether a token is learnt; never the first, which nothing
            predicts.
        supervised_tokens: how many are.
        text_bytes: UTF-8 bytes of what is learnt; a control token counts none.
        truncated: it was too long.
        answered: the last reply that it came with is there, to its end.
    """

    messages: list[Message]
    text: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    supervised_tokens: int
    text_bytes: int
    truncated: bool
    answered: bool


class Text(NamedTuple):
    """A conversation as text; `whole` says that none of its messages was left out."""

    messages: list[Message]
    rendered: Rendered
    whole: bool = True


class Tokenized(NamedTuple):
    """A conversation as tokens."""

    text: Text
    encoded: Encoded


class Supervisor:
    """Renders, encodes, cuts and masks conversations, a batch at a time.

    In three steps, so that other work can be done while the tokenizer works.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        train_on: TrainOn,
        max_length: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._train_on = train_on
        self._max_length = max_length

    def supervise(self, batch: Sequence[list[Message]]) -> list[Supervised | RejectedRow]:
        """Of each conversation what is trained on, or why it cannot be."""
        texts = self.render(batch)
        return self.finish(texts, self.begin(texts))

    def render(self, batch: Sequence[list[Message]]) -> list[Text | RejectedRow]:
        """The first step: texts."""
        return [self._render(messages) for messages in batch]

    def begin(self, batch: Sequence[Text | RejectedRow]) -> list[Encoding]:
        """The second step: tokens, as the tokenizer gives them. It needs no lock of Python's."""
        return encode.begin(self._tokenizer, [one.rendered for one in _usable(batch, Text)])

    def finish(
        self, batch: Sequence[Text | RejectedRow], begun: Sequence[Encoding]
    ) -> list[Supervised | RejectedRow]:
        """The third step: cut what is too long, and mark what is learnt."""
        found = self._read(batch, begun)
        # Encoded again and not cut: what a turn's end becomes may depend on what follows it.
        shorter = {i: text for i, one in enumerate(found) if (text := self._shorten(one))}
        again = [*shorter.values()]
        for i, one in zip(shorter, self._read(again, self.begin(again)), strict=True):
            found[i] = one
        return self._mask(found)

    def _read(
        self, batch: Sequence[Text | RejectedRow], begun: Sequence[Encoding]
    ) -> list[Tokenized | RejectedRow]:
        rendered = [one.rendered for one in _usable(batch, Text)]
        encoded = iter(encode.finish(self._tokenizer, rendered, begun))
        return [
            one if isinstance(one, RejectedRow) else _tokenized(one, next(encoded)) for one in batch
        ]

    def _mask(self, batch: Sequence[Tokenized | RejectedRow]) -> list[Supervised | RejectedRow]:
        """Cut at `max_length` what still is too long, and mark what is learnt."""
        usable = _usable(batch, Tokenized)
        encoded = [_first(one.encoded, self._max_length) for one in usable]
        joined = join([one.text.rendered.text for one in usable], encoded)
        excluded = [_without_weight(one.text) for one in usable]
        learnt = masks.learnt(joined, [self._spans(one) for one in usable], excluded)
        learnt &= ~np.isin(joined.tokens.input_ids, self._template.bos_ids)
        control = encode.control_tokens(self._tokenizer, joined)
        made = map(
            self._supervised,
            usable,
            encoded,
            (learnt[a:b] for a, b in pairwise(joined.edges.tolist())),
            joined.sums(learnt).tolist(),
            masks.utf8_bytes(joined, learnt & ~control).tolist(),
        )
        return [next(made) if isinstance(one, Tokenized) else one for one in batch]

    def _render(self, messages: list[Message], *, whole: bool = True) -> Text | RejectedRow:
        try:
            if self._train_on != "all" and not self._has_weight(messages):
                return RejectedRow(
                    f"no reply that prepare.train_on = {self._train_on} takes has weight"
                )
            if (problem := self._template.problem_with(messages)) is not None:
                return RejectedRow(problem)
            return Text(messages, self._template.render(messages), whole)
        except RejectedRow as reason:
            return reason

    def _shorten(self, one: Tokenized | RejectedRow) -> Text | RejectedRow | None:
        """A conversation without the exchanges that do not fit; None where all are kept."""
        if isinstance(one, RejectedRow) or len(one.encoded) <= self._max_length:
            return None
        messages, kept = one.text.messages, messages_that_fit(one, self._max_length)
        return None if kept == len(messages) else self._render(messages[:kept], whole=False)

    def _has_weight(self, messages: list[Message]) -> bool:
        replies = [message for message in messages if message["role"] == "assistant"]
        return any("weight" not in m for m in replies[-1 if self._train_on == "last" else 0 :])

    def _spans(self, one: Tokenized) -> Sequence[Span]:
        rendered = one.text.rendered
        if self._train_on == "all":
            return ((0, len(rendered.text)),)
        return rendered.replies[-1:] if self._train_on == "last" else rendered.replies

    def _supervised(
        self, one: Tokenized, encoded: Encoded, mask: np.ndarray, count: int, text_bytes: int
    ) -> Supervised | RejectedRow:
        if not count:
            return RejectedRow(
                f"no supervised token within prepare.max_length = {self._max_length}"
            )
        text, whole = one.text.rendered.text, one.text.whole
        cut = len(encoded) < len(one.encoded)
        end = one.text.rendered.replies[-1][1]
        return Supervised(
            messages=one.text.messages,
            text=text[: encoded.ends.max()] if cut else text,
            input_ids=encoded.input_ids,
            loss_mask=mask,
            supervised_tokens=count,
            text_bytes=text_bytes,
            truncated=cut or not whole,
            answered=whole and (not cut or _tokens_until(one.encoded, end) <= len(encoded)),
        )


def messages_that_fit(one: Tokenized, max_length: int) -> int:
    """How many messages to keep: exchanges whose last reply ends within `max_length`; at least one.

    The white space that a template puts after a reply's end may be left out.
    """
    if len(one.encoded) <= max_length:
        return len(one.text.messages)
    replies = [i for i, message in enumerate(one.text.messages) if message["role"] == "assistant"]
    fit = [
        i
        for i, (_, end) in zip(replies, one.text.rendered.replies, strict=True)
        if _tokens_until(one.encoded, end) <= max_length
    ]
    return (fit or replies[:1])[-1] + 1


def _without_weight(text: Text) -> list[Span]:
    """The messages of weight 0: of a reply with all that the model has to write."""
    replies = iter(text.rendered.replies)
    spans = [
        next(replies) if message["role"] == "assistant" else content
        for message, content in zip(text.messages, text.rendered.contents, strict=True)
    ]
    return [span for span, m in zip(spans, text.messages, strict=True) if "weight" in m]


def _usable(batch: Sequence[T | RejectedRow], kind: type[T]) -> list[T]:
    return [one for one in batch if isinstance(one, kind)]


def _tokenized(text: Text, encoded: Encoded | RejectedRow) -> Tokenized | RejectedRow:
    return encoded if isinstance(encoded, RejectedRow) else Tokenized(text, encoded)


def _first(one: Encoded, count: int) -> Encoded:
    return one if len(one) <= count else one[:count]


def _tokens_until(encoded: Encoded, character: int) -> int:
    return int(encoded.starts.searchsorted(character))
