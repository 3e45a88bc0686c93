"""Training examples: tokens, loss mask and weights; truncation between turns."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from stages.prepare.config import Thinking, TrainOn
from stages.shared.chat.conversation import Conversation, Message, RejectedRow
from stages.shared.chat.encode import Encoder, Tokens
from stages.shared.chat.rendering import CONTEXT, Rendered, Span
from stages.shared.chat.templates import Template


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
    # Where a conversation has several rows: the message that is supervised, or the part of a text.
    turn: int | None = None
    weights: np.ndarray | None = None  # fp32 [tokens], 0 where not supervised; None: all are 1
    branch: int = 0  # of a tree, its path; 0: the best


class TooLong(RejectedRow):
    """A row without a supervised token within `prepare.max_length`."""


class ExampleEncoder:
    """Encoder of conversations into training examples."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        train_on: TrainOn,
        max_length: int,
        thinking: Thinking = "keep",
        *,
        merge_system: bool = False,
    ) -> None:
        """With `merge_system`, a template without system messages has them in the first turn."""
        self.template = template
        self._encoder = Encoder(tokenizer, template)
        self._eos = str(tokenizer.eos_token)
        self._train_on, self._thinking, self._max_length = train_on, thinking, max_length
        self.merges_system = merge_system and not template.takes_system

    def encode(self, conversation: Conversation) -> list[Example]:
        """Encode a conversation into one example at least; `RejectedRow` where that cannot be.

        Of a tree, a path that is too long is left out, as turns are.
        """
        paths = [(conversation.messages, 0), *conversation.branches]
        examples, truncated = list[Example](), False
        for branch, (messages, shared) in enumerate(paths):
            try:
                encoded = self._examples(self._path(conversation, messages, shared))
            except TooLong:
                if branch == 0:
                    raise
                truncated = True
            else:
                examples += [one._replace(branch=branch) for one in encoded]
        return [one._replace(truncated=True) for one in examples] if truncated else examples

    def _path(
        self, conversation: Conversation, messages: list[Message], shared: int
    ) -> Conversation:
        """One path of a conversation, without thoughts by `prepare.thinking`, and merged."""
        if self._thinking != "keep" and any("reasoning" in message for message in messages):
            last = len(messages) - 1 if self._thinking == "last" else None
            messages = [
                m if i == last else {k: v for k, v in m.items() if k != "reasoning"}  # type: ignore[misc]
                for i, m in enumerate(messages)
            ]
        if self.merges_system and messages and messages[0]["role"] == "system":
            system, first, *rest = messages
            content = f"{system['content']}\n\n{first['content']}"
            messages, shared = [{**first, "content": content}, *rest], max(0, shared - 1)
        return replace(conversation, messages=messages, shared=shared)

    def _render(self, conversation: Conversation) -> list[Rendered]:
        if conversation.text is not None:
            return [self.template.render_text(conversation.text, self._eos)]
        selected = self._select(conversation)
        if not selected and self._train_on != "all":
            if conversation.shared:  # by flags, this path adds nothing to the others
                return []
            raise RejectedRow(f"no reply that prepare.train_on = {self._train_on} takes has weight")
        return self.template.rows(conversation, [] if self._train_on == "all" else selected)

    def _select(self, conversation: Conversation) -> list[int]:
        """Indices of the replies to supervise."""
        replies = _replies(conversation.messages)
        selected = replies[-1:] if self._train_on == "last" else replies
        selected = [i for i in selected if conversation.messages[i].get("weight", 1)]
        return [i for i in selected if i >= conversation.shared]

    def _too_long(self) -> TooLong:
        return TooLong(f"no supervised token within prepare.max_length = {self._max_length}")

    def _examples(self, conversation: Conversation) -> list[Example]:
        """Examples of a conversation's rows; those too long are left out, or a single one cut."""
        rows = self._render(conversation)
        tokens = [self._encoder.encode(row) for row in rows]
        if conversation.text is not None:
            return self._parts(rows[0], tokens[0])
        # A reply fits to its end token; white space of the template after it may be cut off.
        ends = [
            one.starts.searchsorted([end for _, end in row.replies])
            for row, one in zip(rows, tokens, strict=True)
        ]
        fit = [int((end <= self._max_length).sum()) for end in ends]
        if len(rows) == 1 and len(ends[0]) > max(fit[0], 1):
            # Encoded again, not cut: tokens at a turn's end may depend on the text after it.
            last = _replies(conversation.messages)[max(fit[0], 1) - 1]
            shorter = replace(conversation, messages=conversation.messages[: last + 1])
            if self._train_on != "all" and not self._select(shorter):
                raise self._too_long()
            cut = self._examples(shorter)
            return [one._replace(truncated=True, answered=False) for one in cut]
        fitting = [i for i in range(len(rows)) if len(rows) == 1 or fit[i]]
        fitting = fitting or [*range(len(rows))][:1]
        return [
            self._mask(
                conversation, rows[i], tokens[i], len(fitting) < len(rows), fit[i] == len(ends[i])
            )
            for i in fitting
        ]

    def _parts(self, rendered: Rendered, tokens: Tokens) -> list[Example]:
        """A plain text in parts of `max_length`."""
        starts = range(0, len(tokens), self._max_length)
        parts = [tokens[at : at + self._max_length] for at in starts]
        parts = [part for part in parts if len(part) > 1] or [tokens]  # one token predicts nothing
        return [
            self._example(
                [],
                rendered.text[part.starts.min() : part.ends.max()],
                part,
                np.ones(len(part), np.float32),
                number if len(parts) > 1 else None,
            )
            for number, part in enumerate(parts)
        ]

    def _mask(
        self,
        conversation: Conversation,
        rendered: Rendered,
        tokens: Tokens,
        truncated: bool,
        answered: bool,
    ) -> Example:
        text, messages = rendered.text, conversation.messages
        if len(tokens) > self._max_length:
            truncated, tokens = True, tokens[: self._max_length]
            text = text[: tokens.ends.max()]
        if rendered.turn is not None:
            answered = answered and rendered.turn == len(messages) - 1
            messages = messages[: rendered.turn + 1]
        weights = np.zeros(len(tokens), np.float32)
        for weight, spans in self._weighted_spans(messages, rendered, conversation.shared):
            weights[tokens.overlap(spans)] = weight
        example = self._example(messages, text, tokens, weights, rendered.turn)
        return example._replace(truncated=truncated, answered=answered)

    def _weighted_spans(
        self, messages: Sequence[Message], rendered: Rendered, shared: int
    ) -> list[tuple[float, list[Span]]]:
        """Spans by weight; the last that overlaps a token decides. A reply has its end token."""
        indices = _replies(messages) if rendered.turn is None else [rendered.turn]
        replies = dict(zip(indices, rendered.replies, strict=False))
        if self._train_on == "all":
            spans = [*replies.items()]
            prompts = (part for part in rendered.parts if part.owner not in {CONTEXT, *replies})
            spans += ((part.owner, part[:2]) for part in prompts)
        else:
            spans = [*replies.items()][-1 if self._train_on == "last" else 0 :]
        spans = [(owner, span) for owner, span in spans if owner >= shared]
        by_weight: dict[float, list[Span]] = {}
        if self._train_on == "all":  # with the template's text, from the first row that has it
            end = len(rendered.text)
            begin = min((start for _, (start, _) in spans), default=end) if shared else 0
            by_weight[1.0] = [(begin, end)]
        for owner, span in spans:
            by_weight.setdefault(messages[owner].get("weight", 1.0), []).append(span)
        return sorted(by_weight.items(), reverse=True)

    def _example(
        self,
        messages: list[Message],
        text: str,
        tokens: Tokens,
        weights: np.ndarray,
        turn: int | None,
    ) -> Example:
        weights[np.isin(tokens.input_ids, self.template.bos_ids)] = 0
        weights[:1] = 0  # nothing predicts it
        mask = weights > 0
        if not mask.any():
            raise self._too_long()
        return Example(
            messages=messages,
            text=text,
            input_ids=tokens.input_ids,
            loss_mask=mask,
            supervised_tokens=int(mask.sum()),
            text_bytes=int(tokens.sizes[mask].sum()),
            truncated=False,
            answered=True,
            turn=turn,
            weights=None if np.all(weights[mask] == 1) else weights,
        )


def _replies(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]
