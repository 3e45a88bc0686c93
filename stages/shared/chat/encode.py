"""Encoder of rendered conversations; message text never forges a control token or a turn.

Tokens are those of `apply_chat_template`, except that a control token's string in a message
(`<|im_end|>`) is plain text. A plain-text turn marker there (`### Human:`) rejects the row.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise, zip_longest

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from stages.shared.chat.conversation import Conversation, RejectedRow
from stages.shared.chat.rendered import Rendered, Span
from stages.shared.chat.templates import Template
from stages.shared.chat.tokenizer import pattern_of

_PLACEHOLDERS = 0xF0000  # a plane of Unicode for private use


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens and their characters [start, end); tokens within one character share its span."""

    input_ids: np.ndarray  # int32 [tokens], as the next two
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, which: slice | np.ndarray) -> "Tokens":
        return Tokens(self.input_ids[which], self.starts[which], self.ends[which])

    def overlap(self, spans: Sequence[Span]) -> np.ndarray:
        """Mask of tokens that overlap a span, bool [tokens]."""
        mask = np.zeros(len(self), dtype=bool)
        for start, end in spans:
            if start < end:
                mask |= (self.starts < end) & (self.ends > start)
        return mask


class Encoder:
    """Encoder of a template's rendered conversations for a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        self._template = template
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        added, control = tokenizer.added_tokens_decoder, template.control_tokens
        self._control = {i: token for i, token in added.items() if token.content in control}
        self._is_control = np.zeros(max(self._backend.get_vocab().values()) + 1, dtype=bool)
        self._is_control[[*self._control]] = True
        self._unknown = (tokenizer.unk_token_id, tokenizer.unk_token)
        # Keyed by how the model reads them, if at all.
        markers = zip(self._read_back(template.markers), template.markers, strict=True)
        self._markers = {seen: marker for seen, marker in markers if seen}

    def encode(self, batch: Sequence[Rendered]) -> list[Tokens | RejectedRow]:
        """Encode rendered conversations: tokens, or the rejection, for each."""
        encodings = self._encode([rendered.text for rendered in batch])
        markers = self._find_markers(batch) if self._markers else [None] * len(batch)
        return [*map(self._check, batch, encodings, markers)]

    def _check(
        self, rendered: Rendered, encoding: Encoding, marker: str | None
    ) -> Tokens | RejectedRow:
        if marker is not None:
            return RejectedRow(
                f"a message holds {marker!r}, which is how prepare.template "
                f"{self._template.name!r} marks a turn"
            )
        tokens = _tokens(encoding)
        if not self._is_forged(tokens, rendered):
            return self._separate(rendered, _without_gaps(tokens))
        found = self._encode_as_text(rendered)
        return found if isinstance(found, RejectedRow) else self._separate(rendered, found)

    def _separate(self, rendered: Rendered, tokens: Tokens) -> Tokens | RejectedRow:
        """Encode prompts and replies apart where one token holds the end of one and the other.

        A server's prompt has no such token: two line ends, of which `<think>` has the first.
        """
        cuts = [
            start
            for start, _ in rendered.replies
            if ((tokens.starts < start) & (tokens.ends > start)).any()
        ]
        if not cuts or not self._template.is_own or self._adds_space:
            return tokens
        parts = list[Tokens]()
        for start, end in pairwise([0, *cuts, len(rendered.text)]):
            one = rendered.cut(start, end)
            [encoding] = self._encode([one.text])
            part = self._check(one, encoding, None)
            if isinstance(part, RejectedRow):
                return part
            parts.append(Tokens(part.input_ids, part.starts + start, part.ends + start))
        columns = ((p.input_ids, p.starts, p.ends) for p in parts)
        return Tokens(*map(np.concatenate, zip(*columns, strict=True)))

    @cached_property
    def _adds_space(self) -> bool:
        """Whether a text gets a space before its first word: parts of one would get more."""
        [encoding] = self._encode(["a"])
        return encoding.tokens[0][:1] in ("▁", "Ġ")

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Encode all but the last message, and the generation prompt, or raise `RejectedRow`."""
        prompt = self._template.prompt(conversation, len(conversation.messages) - 1)
        [tokens] = self.encode([prompt])
        if isinstance(tokens, RejectedRow):
            raise tokens
        return [int(token) for token in tokens.input_ids]

    def control_mask(self, tokens: Tokens, text: str) -> np.ndarray:
        """Mask of control tokens, bool [tokens]; the unknown token only for its own string."""
        control = self._is_control[tokens.input_ids]
        token, name = self._unknown
        for at in (control & (tokens.input_ids == token)).nonzero()[0]:
            control[at] = text[tokens.starts[at] : tokens.ends[at]] == name
        return control

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        # tokenizer.json may set these for other uses.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def _read_back(self, texts: Sequence[str]) -> list[str]:
        """Decode texts as the model reads them: normalized, without unknown characters."""
        # After a letter: some decoders strip the first token.
        ids = [encoding.ids for encoding in self._encode([f"a {text}" for text in texts])]
        decoded = self._backend.decode_batch(ids, skip_special_tokens=False)
        return [text.strip().removeprefix("a").strip() for text in decoded]

    def _find_markers(self, batch: Sequence[Rendered]) -> list[str | None]:
        """Find a marker in each conversation's messages, or None."""
        contents = [rendered.text[p.start : p.end] for rendered in batch for p in rendered.parts]
        held = map(self._marker_in, self._read_back(contents))
        return [
            next(filter(None, [next(held) for _ in rendered.parts]), None) for rendered in batch
        ]

    def _marker_in(self, content: str) -> str | None:
        # Also one that the next marker would complete: "=" before "==".
        held = (m for seen, m in self._markers.items() if seen in (content + seen)[:-1])
        return next(held, None)

    @cached_property
    def _plain(self) -> tuple[Tokenizer, dict[str, str], np.ndarray]:
        """Tokenizer that reads control tokens as plain text, and their placeholders as tokens.

        Also the placeholder of each control token (of equal length, so offsets hold), and the
        original id of each of its tokens, int32 [vocabulary].
        """
        plain = copy.deepcopy(self._backend)
        plain.encode_special_tokens = True
        plain.add_special_tokens(
            [AddedToken(t.content, special=True) for t in self._control.values()]
        )
        placeholders, added = {}, []
        for number, token in enumerate(self._control.values()):
            placeholders[token.content] = chr(_PLACEHOLDERS + number) * len(token.content)
            changed = {"content": placeholders[token.content], "special": False}
            added.append(AddedToken(**(token.__getstate__() | changed)))
        plain.add_tokens(added)
        vocabulary = plain.get_vocab()
        ids = np.arange(max(vocabulary.values()) + 1, dtype=np.int32)
        for i, token in self._control.items():
            ids[vocabulary[placeholders[token.content]]] = i
        return plain, placeholders, ids

    def _encode_as_text(self, rendered: Rendered) -> Tokens | RejectedRow:
        """Encode all but the template's own control tokens as plain text."""
        plain, placeholders, ids = self._plain
        pattern = pattern_of(placeholders)
        text = ""
        for literal, part in zip_longest(rendered.literals(), rendered.parts):
            text += pattern.sub(lambda m: placeholders[m[0]], literal)
            text += rendered.text[part.start : part.end] if part else ""
        tokens = _tokens(plain.encode(text, add_special_tokens=False))
        tokens = Tokens(ids[tokens.input_ids], tokens.starts, tokens.ends)
        if self._is_forged(tokens, rendered):
            return RejectedRow("the tokenizer makes a control token of a message's plain text")
        return _without_gaps(tokens)

    def _is_forged(self, tokens: Tokens, rendered: Rendered) -> bool:
        """Whether a control token overlaps a message."""
        control = tokens[self.control_mask(tokens, rendered.text)]
        return bool(control.overlap([part[:2] for part in rendered.parts]).any())


def _tokens(encoding: Encoding) -> Tokens:
    ids = np.array(encoding.ids, dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids))
    return Tokens(ids, *flat.reshape(-1, 2).T)


def _without_gaps(tokens: Tokens) -> Tokens:
    """Extend spans over white space, which some tokenizers leave out before a word."""
    starts = np.minimum(tokens.starts, np.append(np.int32(0), tokens.ends[:-1]))
    return Tokens(tokens.input_ids, starts, tokens.ends)
