"""Training examples: tokens, loss mask, and truncation between turns of a long conversation."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from stages.shared.chat.conversation import Message, RejectedRow
from stages.shared.chat.encode import Encoder, Tokens
from stages.shared.chat.templates import Rendered, Span, Template

T = TypeVar("T")
TrainOn = Literal["assistant", "last", "all"]


class Example(NamedTuple):
    """A conversation as it is trained on."""

    messages: list[Message]  # whole exchanges; of a single one that is too long, all of it
    text: str  # of the tokens
    input_ids: np.ndarray  # int32 [tokens], at most max_length
    loss_mask: np.ndarray  # bool [tokens], which are supervised; never the first, nor BOS
    supervised_tokens: int
    text_bytes: int  # UTF-8 bytes of the supervised text; a control token counts none
    truncated: bool
    answered: bool  # its original last reply is complete


class ExampleEncoder:
    """Makes training examples of conversations."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        train_on: TrainOn,
        max_length: int,
    ) -> None:
        self.template = template
        self._encoder = Encoder(tokenizer, template)
        self._train_on = train_on
        self._max_length = max_length

    def encode(self, batch: Sequence[list[Message]]) -> list[Example | RejectedRow]:
        """Encode conversations; of each the example, or why it is rejected."""
        rendered = [_or_reason(self._render, messages) for messages in batch]
        tokens = iter(self._encoder.encode([r for r in rendered if isinstance(r, Rendered)]))
        return [
            one
            if isinstance(one, RejectedRow)
            else _or_reason(self._truncate, messages, one, next(tokens))
            for messages, one in zip(batch, rendered, strict=True)
        ]

    def _render(self, messages: list[Message]) -> Rendered:
        replies = [message for message in messages if message["role"] == "assistant"]
        selected = replies[-1:] if self._train_on == "last" else replies
        if self._train_on != "all" and all("weight" in reply for reply in selected):
            raise RejectedRow(f"no reply that prepare.train_on = {self._train_on} takes has weight")
        return self.template.render(messages)

    def _truncate(
        self, messages: list[Message], rendered: Rendered, tokens: Tokens | RejectedRow
    ) -> Example:
        """Leave out exchanges that do not fit, else cut the tokens of the first."""
        if isinstance(tokens, RejectedRow):
            raise tokens
        kept = messages_that_fit(messages, rendered, tokens, self._max_length)
        whole = kept == len(messages)
        if not whole:
            # Encoded anew and not cut: the tokens of a turn's end may depend on what follows it.
            messages = messages[:kept]
            rendered = self._render(messages)
            [tokens] = self._encoder.encode([rendered])
            if isinstance(tokens, RejectedRow):
                raise tokens
        return self._mask(messages, rendered, tokens, whole)

    def _mask(
        self, messages: list[Message], rendered: Rendered, tokens: Tokens, whole: bool
    ) -> Example:
        text, cut = rendered.text, len(tokens) > self._max_length
        answered = whole and _tokens_until(tokens, rendered.replies[-1][1]) <= self._max_length
        if cut:
            tokens = tokens[: self._max_length]
            text = text[: tokens.ends.max()]
        mask = tokens.overlap(self._supervised_spans(rendered))
        mask &= ~tokens.overlap(_spans_without_weight(messages, rendered))
        mask &= ~np.isin(tokens.input_ids, self.template.bos_ids)
        mask[:1] = False  # nothing predicts it
        if not mask.any():
            raise RejectedRow(f"no supervised token within prepare.max_length = {self._max_length}")
        plain = mask & ~self._encoder.control_mask(tokens, rendered.text)
        return Example(
            messages=messages,
            text=text,
            input_ids=tokens.input_ids,
            loss_mask=mask,
            supervised_tokens=int(mask.sum()),
            text_bytes=_utf8_bytes(rendered.text, tokens, plain),
            truncated=cut or not whole,
            answered=answered,
        )

    def _supervised_spans(self, rendered: Rendered) -> Sequence[Span]:
        if self._train_on == "all":
            return ((0, len(rendered.text)),)
        return rendered.replies[-1:] if self._train_on == "last" else rendered.replies


def messages_that_fit(
    messages: Sequence[Message], rendered: Rendered, tokens: Tokens, max_length: int
) -> int:
    """How many messages to keep: exchanges whose last reply ends within `max_length`; at least one.

    The white space that a template puts after a reply's end may be left out.
    """
    fit = sum(_tokens_until(tokens, end) <= max_length for _, end in rendered.replies)
    return len(messages) - 2 * (len(rendered.replies) - max(fit, 1))


def _tokens_until(tokens: Tokens, character: int) -> int:
    return int(tokens.starts.searchsorted(character))


def _spans_without_weight(messages: Sequence[Message], rendered: Rendered) -> list[Span]:
    """The messages of weight 0: of a reply with all that the model has to write."""
    if not any("weight" in message for message in messages):
        return []
    replies = iter(rendered.replies)
    spans = [
        next(replies) if message["role"] == "assistant" else content
        for message, content in zip(messages, rendered.contents, strict=True)
    ]
    return [span for span, m in zip(spans, messages, strict=True) if "weight" in m]


def _utf8_bytes(text: str, tokens: Tokens, mask: np.ndarray) -> int:
    """Bytes of the characters that some tokens stand for, bool [tokens]; never the first."""
    firsts, lasts = np.diff(mask, prepend=False, append=False).nonzero()[0].reshape(-1, 2).T
    runs = zip(tokens.starts[firsts].tolist(), tokens.ends[lasts - 1].tolist(), strict=True)
    return sum(len(text[start:end].encode()) for start, end in runs)


def _or_reason(function: Callable[..., T], *args: Any) -> T | RejectedRow:
    """Its result, or the reason why it rejects a row."""
    try:
        return function(*args)
    except RejectedRow as reason:
        return reason
