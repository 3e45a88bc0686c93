"""Training examples: tokens, loss mask, and truncation between turns of a long conversation."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from stages.shared.chat.conversation import Conversation, Message, RejectedRow
from stages.shared.chat.encode import Encoder, Tokens
from stages.shared.chat.templates import Rendered, Span, Template

T = TypeVar("T")
TrainOn = Literal["assistant", "last", "all"]


class Example(NamedTuple):
    """A training example."""

    messages: list[Message]  # whole exchanges; a single overlong one is kept whole
    text: str  # of the tokens
    input_ids: np.ndarray  # int32 [tokens], at most max_length
    loss_mask: np.ndarray  # bool [tokens], which are supervised; never the first, nor BOS
    supervised_tokens: int
    text_bytes: int  # UTF-8 bytes of the supervised text; a control token counts none
    truncated: bool
    answered: bool  # its original last reply is complete
    turn: int | None = None  # the one message supervised, where a conversation has several rows
    weights: np.ndarray | None = None  # fp32 [tokens], 0 where not supervised; None: all are 1


class ExampleEncoder:
    """Encoder of conversations into training examples."""

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

    def encode_conversations(
        self, batch: Sequence[Conversation]
    ) -> list[list[Example] | RejectedRow]:
        """Encode conversations: the examples, at least one, or the rejection, for each."""
        reasons = [_or_reason(_require_rendered, one) for one in batch]
        plain = [one for one, reason in zip(batch, reasons, strict=True) if reason is None]
        encoded = iter(self.encode([one.messages for one in plain]))
        examples = (next(encoded) if reason is None else reason for reason in reasons)
        return [one if isinstance(one, RejectedRow) else [one] for one in examples]

    def encode(self, batch: Sequence[list[Message]]) -> list[Example | RejectedRow]:
        """Encode conversations: an example, or the rejection, for each."""
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
        """Drop exchanges that do not fit; cut the tokens of a single one."""
        if isinstance(tokens, RejectedRow):
            raise tokens
        # A reply fits to its end token; white space of the template after it may be cut off.
        ends = tokens.starts.searchsorted([end for _, end in rendered.replies])
        fit = int((ends <= self._max_length).sum())
        left_out = len(ends) - max(fit, 1)
        if left_out:
            # Encoded again, not cut: tokens at a turn's end may depend on the text after it.
            messages = messages[: -2 * left_out]
            rendered = self._render(messages)
            [tokens] = self._encoder.encode([rendered])
            if isinstance(tokens, RejectedRow):
                raise tokens
        return self._mask(messages, rendered, tokens, left_out > 0, fit == len(ends))

    def _mask(
        self,
        messages: list[Message],
        rendered: Rendered,
        tokens: Tokens,
        truncated: bool,
        answered: bool,
    ) -> Example:
        text = rendered.text
        if len(tokens) > self._max_length:
            truncated = True
            tokens = tokens[: self._max_length]
            text = text[: tokens.ends.max()]
        spans = rendered.replies[-1:] if self._train_on == "last" else rendered.replies
        if self._train_on == "all":
            spans = ((0, len(rendered.text)),)
        mask = tokens.overlap(spans)
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
            truncated=truncated,
            answered=answered,
        )


def _spans_without_weight(messages: Sequence[Message], rendered: Rendered) -> list[Span]:
    """Spans of messages of weight 0; a reply's includes its end token."""
    if not any("weight" in message for message in messages):
        return []
    replies = iter(rendered.replies)
    spans = [
        next(replies) if message["role"] == "assistant" else content
        for message, content in zip(messages, rendered.contents, strict=True)
    ]
    return [span for span, m in zip(spans, messages, strict=True) if "weight" in m]


def _utf8_bytes(text: str, tokens: Tokens, mask: np.ndarray) -> int:
    """UTF-8 bytes of the masked tokens' characters; mask: bool [tokens]."""
    firsts, lasts = np.diff(mask, prepend=False, append=False).nonzero()[0].reshape(-1, 2).T
    runs = zip(tokens.starts[firsts].tolist(), tokens.ends[lasts - 1].tolist(), strict=True)
    return sum(len(text[start:end].encode()) for start, end in runs)


def _require_rendered(conversation: Conversation) -> None:
    """Refuse what is not rendered yet."""
    if conversation.text is not None:
        raise RejectedRow("plain text is not rendered yet")
    if conversation.tools or conversation.template_kwargs:
        raise RejectedRow("tools and template arguments are not rendered yet")
    for message in conversation.messages:
        if message.keys() - {"role", "content", "weight"} or message.get("weight", 0) > 0:
            raise RejectedRow("tool calls, thoughts and weights are not rendered yet")


def _or_reason(function: Callable[..., T], *args: Any) -> T | RejectedRow:
    try:
        return function(*args)
    except RejectedRow as reason:
        return reason
