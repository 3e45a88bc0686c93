"""Tokens of rendered conversations; no text of a message becomes a control token, nor a turn.

A conversation has the tokens that `apply_chat_template` gives. Only where a message holds the
string of a control token (`<|im_end|>`), all but the template's own control tokens is encoded as
plain text. A message that holds a plain-text marker of a turn (`### Human:`) is rejected.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from stages.shared.chat.conversation import Message, RejectedRow
from stages.shared.chat.templates import Rendered, Span, Template
from stages.shared.chat.tokenizer import pattern_of

_PLACEHOLDERS = 0xF0000  # a plane of Unicode for private use


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text.

    Attributes:
        input_ids: int32 [tokens].
        starts: int32 [tokens], the first character that each token stands for.
        ends: int32 [tokens], the character after its last. There is no gap between tokens; where
            several share the bytes of one character, each of them stands for it.
    """

    input_ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, which: slice | np.ndarray) -> "Tokens":
        return Tokens(self.input_ids[which], self.starts[which], self.ends[which])

    def overlap(self, spans: Sequence[Span]) -> np.ndarray:
        """Which tokens hold a character of a span, bool [tokens]."""
        mask = np.zeros(len(self), dtype=bool)
        for start, end in spans:
            if start < end:
                mask |= (self.starts < end) & (self.ends > start)
        return mask


class Encoder:
    """Encodes what a template renders for a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        self._template = template
        self._added = {
            added.content: added
            for added in tokenizer.added_tokens_decoder.values()
            if added.content in template.control_tokens
        }
        self._unknown = tokenizer.unk_token
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._is_control = self._flags(self._added)
        # The token for what is unknown may stand for a character of any text.
        certain = self._added.keys() - ({self._unknown} - {tokenizer.eos_token})
        self._is_certain_control = self._flags(certain)
        self._markers = {
            seen: marker
            for marker, seen in zip(
                template.markers, self._read_back(template.markers), strict=True
            )
            if seen
        }

    def encode(self, batch: Sequence[Rendered]) -> list[Tokens | RejectedRow]:
        """Encode rendered conversations; of each its tokens, or why it is rejected."""
        encodings = self._encode([rendered.text for rendered in batch])
        markers = self._find_markers(batch) if self._markers else [None] * len(batch)
        results: list[Tokens | RejectedRow] = []
        for rendered, encoding, marker in zip(batch, encodings, markers, strict=True):
            if marker is not None:
                name = self._template.name
                results.append(
                    RejectedRow(
                        f"a message holds {marker!r}, which is how prepare.template {name!r} "
                        "marks a turn"
                    )
                )
                continue
            tokens = _tokens(encoding)
            control = tokens[self.control_mask(tokens, rendered.text)]
            forged = control.overlap(rendered.contents).any()
            results.append(self._encode_as_text(rendered) if forged else tokens)
        return results

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens up to and including the generation prompt.

        Args:
            messages: a conversation that ends with a user's turn.

        Raises:
            RejectedRow: it cannot be rendered or encoded; `prepare` accepts no such conversation.
        """
        [tokens] = self.encode([self._template.render(messages, prompt=True)])
        if isinstance(tokens, RejectedRow):
            raise tokens
        return [int(token) for token in tokens.input_ids]

    def control_mask(self, tokens: Tokens, text: str) -> np.ndarray:
        """Which tokens are control tokens, bool [tokens].

        The one for what is unknown is none where it stands for other characters than its own.
        """
        control = self._is_control[tokens.input_ids]
        if self._unknown in self._added:
            unknown = self._backend.token_to_id(self._unknown)
            for at in (tokens.input_ids == unknown).nonzero()[0]:
                control[at] = text[tokens.starts[at] : tokens.ends[at]] == self._unknown
        return control

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        # Settings of tokenizer.json that are meant for other uses.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def _read_back(self, texts: Sequence[str]) -> list[str]:
        """Texts as the model reads them: normalized, without what the vocabulary drops."""
        # Behind a letter, since some decoders drop spaces of a first token.
        ids = [encoding.ids for encoding in self._encode([f"a {text}" for text in texts])]
        decoded = self._backend.decode_batch(ids, skip_special_tokens=False)
        return [text.strip().removeprefix("a").strip() for text in decoded]

    def _find_markers(self, batch: Sequence[Rendered]) -> list[str | None]:
        """Of each conversation a marker that one of its messages holds."""
        contents = [rendered.text[a:b] for rendered in batch for a, b in rendered.contents]
        held = map(self._marker_in, self._read_back(contents))
        return [
            next(filter(None, [next(held) for _ in rendered.contents]), None) for rendered in batch
        ]

    def _marker_in(self, content: str) -> str | None:
        for seen, marker in self._markers.items():
            # Also one that a message begins and the marker after it completes: "=" before "==".
            if seen in (content + seen)[:-1]:
                return marker
        return None

    def _flags(self, tokens: Iterable[str]) -> np.ndarray:
        """Which tokens of the vocabulary these are, bool [vocabulary]."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        flags = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
        flags[[vocabulary[token] for token in tokens]] = True
        return flags

    @cached_property
    def _plain(self) -> tuple[Tokenizer, dict[str, str], np.ndarray]:
        """A tokenizer to which control tokens are plain text, but placeholders of them are not.

        Returns:
            It; the placeholder of each control token, as long as its string, so that every
            character keeps its place; and of each of its tokens the original, int32 [vocabulary].
        """
        plain = copy.deepcopy(self._backend)
        plain.encode_special_tokens = True
        plain.add_special_tokens([AddedToken(token, special=True) for token in self._added])
        placeholders = {}
        for i, (token, added) in enumerate(self._added.items()):
            placeholders[token] = chr(_PLACEHOLDERS + i) * len(token)
            changed = {"content": placeholders[token], "special": False}
            plain.add_tokens([AddedToken(**(added.__getstate__() | changed))])
        vocabulary = plain.get_vocab(with_added_tokens=True)
        ids = np.arange(max(vocabulary.values()) + 1, dtype=np.int32)
        for token, placeholder in placeholders.items():
            ids[vocabulary[placeholder]] = vocabulary[token]
        return plain, placeholders, ids

    def _encode_as_text(self, rendered: Rendered) -> Tokens | RejectedRow:
        """Encode all but the template's own control tokens as plain text."""
        plain, placeholders, ids = self._plain
        pattern = pattern_of(placeholders)
        edges = [0, *chain.from_iterable(rendered.contents), len(rendered.text)]
        pieces = [rendered.text[start:end] for start, end in pairwise(edges)]
        pieces[::2] = [pattern.sub(lambda m: placeholders[m[0]], piece) for piece in pieces[::2]]
        tokens = _tokens(plain.encode("".join(pieces), add_special_tokens=False))
        tokens = Tokens(ids[tokens.input_ids], tokens.starts, tokens.ends)
        control = tokens[self._is_certain_control[tokens.input_ids]]
        if control.overlap(rendered.contents).any():
            return RejectedRow("the tokenizer makes a control token of a message's plain text")
        return tokens


def _tokens(encoding: Encoding) -> Tokens:
    """Tokens without gaps: some tokenizers leave the white space before a word out of its span."""
    ids = np.array(encoding.ids, dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids))
    starts, ends = flat.reshape(-1, 2).T
    np.minimum(starts[1:], ends[:-1], out=starts[1:])
    starts[:1] = 0
    return Tokens(ids, starts, ends)
