"""Encoder of rendered conversations; message text never forges a control token or a turn.

Tokens are those of `apply_chat_template`, except that a control token's string in a message
(`<|im_end|>`) is plain text. A plain-text turn marker there (`### Human:`) rejects the row.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise, zip_longest

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from stages.shared.chat.conversation import Conversation, RejectedRow
from stages.shared.chat.rendering import Rendered, Span
from stages.shared.chat.templates import Template
from stages.shared.chat.tokenizer import pattern_of

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_PLACEHOLDERS = 0xF0000  # a plane of Unicode for private use


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens and their characters [start, end); tokens within one character share its span."""

    input_ids: np.ndarray  # int32 [tokens], as the next two
    starts: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray  # UTF-8 bytes, of a shared character its own; 0: a control token

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, which: slice | np.ndarray) -> "Tokens":
        columns = (self.input_ids, self.starts, self.ends, self.sizes)
        return Tokens(*(column[which] for column in columns))

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
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        added, control = tokenizer.added_tokens_decoder, template.control_tokens
        self._control = {i: token for i, token in added.items() if token.content in control}
        vocabulary = self._backend.get_vocab()
        self._is_control = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
        self._is_control[[*self._control]] = True
        # Of vocabularies of bytes, a byte each: `ðŁ`, `<0xF0>`. An added space `▁` has none.
        self._symbols = np.ones(len(self._is_control), dtype=np.int32)
        for token, i in vocabulary.items():
            self._symbols[i] = 1 if _BYTE.fullmatch(token) else len(token.strip("▁"))
        self._unknown = (tokenizer.unk_token_id, tokenizer.unk_token)
        # Keyed by how the model reads them, if at all.
        markers = zip(self._read_back(template.markers), template.markers, strict=True)
        self._markers = {seen: marker for seen, marker in markers if seen}

    @property
    def _backend(self) -> Tokenizer:
        # tokenizer.json may set these for other uses.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = False
        return self._tokenizer

    def encode(self, rendered: Rendered) -> Tokens:
        """Encode a rendered conversation; `RejectedRow` for a turn marker in a message."""
        self._require_no_marker(rendered)
        tokens = self._encode(rendered)
        # A server's prompt shares no token with the reply: two line ends, of which `<think>` has
        # the first, are encoded apart.
        cuts = [
            start
            for start, _ in rendered.replies
            if ((tokens.starts < start) & (tokens.ends > start)).any()
        ]
        if not cuts or not self._template.is_own or self._adds_space:
            return tokens
        edges = [0, *cuts, len(rendered.text)]
        parts = [self._encode(rendered.cut(start, end)) for start, end in pairwise(edges)]
        columns = (
            (part.input_ids, part.starts + start, part.ends + start, part.sizes)
            for part, start in zip(parts, edges, strict=False)
        )
        return Tokens(*map(np.concatenate, zip(*columns, strict=True)))

    @cached_property
    def _adds_space(self) -> bool:
        """Whether a text gets a space before its first word: parts of one would get more."""
        [token, *_] = self._backend.encode("a", add_special_tokens=False).tokens
        return token[:1] in ("▁", "Ġ")

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Encode all but the last message, and the generation prompt, or raise `RejectedRow`."""
        prompt = self._template.prompt(conversation, len(conversation.messages) - 1)
        ids: list[int] = self.encode(prompt).input_ids.tolist()
        return ids

    def _encode(self, rendered: Rendered) -> Tokens:
        """Encode a text so that its messages hold no control token."""
        tokens = _tokens(self._backend.encode(rendered.text, add_special_tokens=False))
        if self._is_forged(tokens, rendered):
            tokens = self._encode_as_text(rendered)
        # Some tokenizers leave out white space before a word.
        np.minimum(tokens.starts[1:], tokens.ends[:-1], out=tokens.starts[1:])
        tokens.starts[:1] = 0
        self._measure(tokens, rendered.text)
        return tokens

    def _measure(self, tokens: Tokens, text: str) -> None:
        """Set the tokens' sizes."""
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        before = np.append(0, np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)))
        ends = before[tokens.ends]
        shares = tokens.starts[1:] < tokens.ends[:-1]  # a character with the token before
        if shares.any():
            first = np.append(0, np.where(shares, 0, np.arange(1, len(tokens))))
            first = np.maximum.accumulate(first)
            symbols = np.append(0, np.cumsum(self._symbols[tokens.input_ids]))
            own = before[tokens.starts[first]] + symbols[1:] - symbols[first]
            ends[:-1] = np.where(shares, np.minimum(own, ends)[:-1], ends[:-1])
        tokens.sizes[:] = ends
        tokens.sizes[1:] -= ends[:-1]
        tokens.sizes[self.control_mask(tokens, text)] = 0

    def control_mask(self, tokens: Tokens, text: str) -> np.ndarray:
        """Mask of control tokens, bool [tokens]; the unknown token only for its own string."""
        control = self._is_control[tokens.input_ids]
        token, name = self._unknown
        for at in (control & (tokens.input_ids == token)).nonzero()[0]:
            control[at] = text[tokens.starts[at] : tokens.ends[at]] == name
        return control

    def _read_back(self, texts: Sequence[str]) -> list[str]:
        """Decode texts as the model reads them: normalized, without unknown characters."""
        # After a letter: some decoders strip the first token.
        texts = [f"a {text}" for text in texts]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        decoded = self._backend.decode_batch(ids, skip_special_tokens=False)
        return [text.strip().removeprefix("a").strip() for text in decoded]

    def _require_no_marker(self, rendered: Rendered) -> None:
        contents = [rendered.text[part.start : part.end] for part in rendered.parts]
        for content in self._read_back(contents) if self._markers else ():
            for seen, marker in self._markers.items():
                # Also one that the next marker would complete: "=" before "==".
                if seen in (content + seen)[:-1]:
                    raise RejectedRow(
                        f"a message holds {marker!r}, which is how prepare.template "
                        f"{self._template.name!r} marks a turn"
                    )

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

    def _encode_as_text(self, rendered: Rendered) -> Tokens:
        """Encode all but the template's own control tokens as plain text."""
        plain, placeholders, ids = self._plain
        pattern = pattern_of(placeholders)
        text = ""
        for literal, part in zip_longest(rendered.literals(), rendered.parts):
            text += pattern.sub(lambda m: placeholders[m[0]], literal)
            text += rendered.text[part.start : part.end] if part else ""
        tokens = _tokens(plain.encode(text, add_special_tokens=False))
        tokens = replace(tokens, input_ids=ids[tokens.input_ids])
        if self._is_forged(tokens, rendered):
            raise RejectedRow("the tokenizer makes a control token of a message's plain text")
        return tokens

    def _is_forged(self, tokens: Tokens, rendered: Rendered) -> bool:
        """Whether a control token overlaps a message."""
        control = tokens[self.control_mask(tokens, rendered.text)]
        return bool(control.overlap([part[:2] for part in rendered.parts]).any())


def _tokens(encoding: Encoding) -> Tokens:
    ids = np.array(encoding.ids, dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids))
    starts, ends = flat.reshape(-1, 2).T
    return Tokens(ids, starts, ends, sizes=np.zeros_like(ids))
