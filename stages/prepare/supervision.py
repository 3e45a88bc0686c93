"""Which tokens are learnt, and what is kept of a conversation that is too long."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from stages.shared import encoding, vocabulary
from stages.shared.conversation import Message, Unusable
from stages.shared.encoding import Encoded
from stages.shared.templates import Rendered, Template

TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class Supervised:
    """A conversation as it is trained on.

    Attributes:
        messages: whole exchanges; of a single one that is too long, all of it.
        text: what the tokens stand for.
        input_ids: int32 [tokens], at most `max_length`.
        loss_mask: bool [tokens], whether a token is learnt; never the first, which nothing
            predicts.
        text_bytes: UTF-8 bytes of what is learnt; a control token counts none.
        truncated: it was too long.
        answered: the last reply that it came with is there, to its end.
    """

    messages: list[Message]
    text: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    text_bytes: int
    truncated: bool
    answered: bool


@dataclass(frozen=True)
class _Tokenized:
    messages: list[Message]
    rendered: Rendered
    encoded: Encoded


class Supervisor:
    """Renders, encodes, cuts and masks conversations, a batch at a time."""

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
        control = sorted(vocabulary.control_tokens(tokenizer))
        # Looked up by token: on the few tokens of a row, a search costs ten times that.
        self._is_control = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=bool)
        self._is_control[tokenizer.convert_tokens_to_ids(control)] = True
        self._unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id

    def supervise(self, batch: list[list[Message]]) -> list[Supervised | Unusable]:
        """Of each conversation what is trained on, or why it cannot be."""
        whole = self._tokenize(batch)
        kept = [
            len(messages) if isinstance(one, Unusable) else messages_that_fit(one, self._max_length)
            for one, messages in zip(whole, batch, strict=True)
        ]
        # Encoded again and not cut: what a turn's end becomes may depend on what follows it.
        cut = [i for i, messages in enumerate(batch) if kept[i] < len(messages)]
        shorter = dict(zip(cut, self._tokenize([batch[i][: kept[i]] for i in cut]), strict=True))
        return [
            one if isinstance(one, Unusable) else self._mask(one, len(batch[i]))
            for i, one in enumerate(shorter.get(i, one) for i, one in enumerate(whole))
        ]

    def _tokenize(self, batch: list[list[Message]]) -> list[_Tokenized | Unusable]:
        rendered = [self._render(messages) for messages in batch]
        encoded = iter(
            encoding.encode(self._tokenizer, [r for r in rendered if isinstance(r, Rendered)])
        )
        found: list[_Tokenized | Unusable] = []
        for messages, text in zip(batch, rendered, strict=True):
            if isinstance(text, Unusable):
                found.append(text)
                continue
            tokens = next(encoded)
            if isinstance(tokens, Encoded):
                found.append(_Tokenized(messages, text, tokens))
            else:
                found.append(tokens)
        return found

    def _render(self, messages: list[Message]) -> Rendered | Unusable:
        try:
            if (problem := self._template.problem_with(messages)) is not None:
                return Unusable(problem)
            return self._template.render(messages)
        except Unusable as reason:
            return reason

    def _mask(self, one: _Tokenized, messages: int) -> Supervised | Unusable:
        """Cut at `max_length` what is still too long, and mark what is learnt."""
        text = one.rendered.text
        ids = one.encoded.input_ids[: self._max_length]
        starts, ends = one.encoded.starts[: len(ids)], one.encoded.ends[: len(ids)]
        cut = len(ids) < len(one.encoded.input_ids)
        spans = {
            "assistant": one.rendered.replies,
            "last": one.rendered.replies[-1:],
            "all": ((0, len(text)),),
        }[self._train_on]
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            mask |= (starts < end) & (ends > start)
        mask[:1] = False
        if not mask.any():
            return Unusable(f"no supervised token within prepare.max_length = {self._max_length}")
        whole = len(one.messages) == messages
        control = self._is_control[ids]
        for at in (ids == self._unknown).nonzero()[0]:  # it may stand for a message's characters
            control[at] = text[starts[at] : ends[at]] == self._tokenizer.unk_token
        return Supervised(
            messages=one.messages,
            text=text[: ends.max()] if cut else text,
            input_ids=ids,
            loss_mask=mask,
            text_bytes=_bytes(text, starts, ends, mask & ~control),
            truncated=cut or not whole,
            answered=whole and _tokens_until(one.encoded, one.rendered.replies[-1][1]) <= len(ids),
        )


def messages_that_fit(one: _Tokenized, max_length: int) -> int:
    """How many messages to keep: exchanges whose last reply ends within `max_length`; at least one.

    The white space that a template puts after a reply's end may be left out.
    """
    if len(one.encoded.input_ids) <= max_length:
        return len(one.messages)
    replies = [i for i, message in enumerate(one.messages) if message["role"] == "assistant"]
    fit = [
        i
        for i, (_, end) in zip(replies, one.rendered.replies, strict=True)
        if _tokens_until(one.encoded, end) <= max_length
    ]
    return (fit or replies[:1])[-1] + 1


def _tokens_until(encoded: Encoded, character: int) -> int:
    return int(encoded.starts.searchsorted(character))


def _bytes(text: str, starts: np.ndarray, ends: np.ndarray, learnt: np.ndarray) -> int:
    """UTF-8 bytes of the characters that some tokens stand for."""
    around = np.zeros(len(learnt) + 2, dtype=bool)
    around[1:-1] = learnt
    edges = (around[1:] != around[:-1]).nonzero()[0].tolist()
    runs = zip(edges[::2], edges[1::2], strict=True)
    return sum(len(text[starts[first] : ends[last - 1]].encode()) for first, last in runs)
