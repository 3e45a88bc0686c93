"""The one way to turn a rendered conversation into tokens.

What a message says can never become a control token, and so never a turn: where a message holds
the string of one, everything between the template's own control tokens is encoded as plain text.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerBase

from stages.shared import vocabulary
from stages.shared.conversation import Message, Unusable
from stages.shared.templates import Rendered, Span, Template


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text.

    Attributes:
        input_ids: int32 [tokens].
        starts: int32 [tokens], the first character that each token stands for.
        ends: int32 [tokens], the character after its last. Tokens leave no gap between them; where
            several share the bytes of one character, each of them stands for it.
    """

    input_ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def encode(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Rendered]
) -> list[Encoded | Unusable]:
    """Encode rendered conversations, in the tokenizer's own threads.

    Returns:
        Of each the tokens, those that `apply_chat_template` gives except where a message holds the
        string of a control token; or, where the tokenizer makes a control token even of plain
        text, the reason why it cannot be used.
    """
    pattern = vocabulary.control_pattern(tokenizer)
    forging = [_has_control_tokens(pattern, rendered) for rendered in batch]
    whole = _encode_texts(
        tokenizer, [r.text for r, apart in zip(batch, forging, strict=True) if not apart]
    )
    return [
        _encode_apart(tokenizer, pattern, rendered) if apart else next(whole)
        for rendered, apart in zip(batch, forging, strict=True)
    ]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, template: Template, messages: Sequence[Message]
) -> list[int]:
    """The tokens up to and including what a reply follows.

    Args:
        tokenizer: the one that the template was made for.
        template: how conversations are rendered.
        messages: a conversation that ends with a user's turn.

    Raises:
        Unusable: it cannot be rendered or encoded; no conversation that `prepare` accepted.
    """
    [found] = encode(tokenizer, [template.render(messages, prompt=True)])
    if isinstance(found, Unusable):
        raise found
    return [int(token) for token in found.input_ids]


def _has_control_tokens(pattern: re.Pattern[str], rendered: Rendered) -> bool:
    """Whether a message holds the string of a control token, in full or across its ends."""
    return [m.span() for m in pattern.finditer(rendered.text)] != _controls(pattern, rendered)


def _controls(pattern: re.Pattern[str], rendered: Rendered) -> list[Span]:
    """Where the template's own control tokens stand."""
    edges = [0, *(at for span in rendered.contents for at in span), len(rendered.text)]
    between = zip(edges[::2], edges[1::2], strict=True)
    return [m.span() for a, b in between for m in pattern.finditer(rendered.text, a, b)]


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, plain: bool = False
) -> Iterator[Encoded]:
    """Encode whole texts; `plain` makes ordinary text of the strings of control tokens too."""
    # Asked directly: transformers would turn each answer into lists that nobody reads.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = plain
    for found in backend.encode_batch(texts, add_special_tokens=False):
        yield _tiled(found.ids, found.offsets)


def _tiled(ids: list[int], offsets: list[Span]) -> Encoded:
    """Close the gaps: some tokenizers leave the white space before a word out of its span."""
    spans = np.fromiter(chain.from_iterable(offsets), np.int32, 2 * len(ids)).reshape(-1, 2)
    starts, ends = spans.T
    np.minimum(starts[1:], ends[:-1], out=starts[1:])
    starts[:1] = 0
    return Encoded(np.asarray(ids, dtype=np.int32), starts, ends)


def _encode_apart(
    tokenizer: PreTrainedTokenizerBase, pattern: re.Pattern[str], rendered: Rendered
) -> Encoded | Unusable:
    """Encode, piece by piece, all but the template's own control tokens as plain text."""
    unknown = {tokenizer.unk_token} - {tokenizer.eos_token}  # it may stand for a character
    control = sorted(vocabulary.control_tokens(tokenizer) - unknown)
    control_ids = tokenizer.convert_tokens_to_ids(control)
    pieces: list[Encoded] = []
    at = 0
    for start, end in [*_controls(pattern, rendered), (len(rendered.text), 0)]:
        if start > at:
            plain = _encode_plain(tokenizer, rendered.text[at:start], at)
            if np.isin(plain.input_ids, control_ids).any():
                return Unusable("the tokenizer makes a control token of a message's plain text")
            pieces.append(plain)
        if end:
            token = tokenizer.convert_tokens_to_ids(rendered.text[start:end])
            pieces.append(Encoded(np.array([token]), np.array([start]), np.array([end])))
        at = end
    arrays = zip(*((p.input_ids, p.starts, p.ends) for p in pieces), strict=True)
    return Encoded(*(np.concatenate(parts).astype(np.int32) for parts in arrays))


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, at: int) -> Encoded:
    """Encode a piece that begins at character `at` as it is encoded there.

    Some tokenizers put a space before the first word of a text, and only there. To them a piece
    from the middle is given after a line end, whose tokens are then taken away.
    """
    before = "\n" if at and _spaces_a_beginning(tokenizer) else ""
    skip = len(tokenizer.encode(before, add_special_tokens=False))
    found = next(_encode_texts(tokenizer, [before + text], plain=True))
    shift = at - len(before)
    return Encoded(found.input_ids[skip:], found.starts[skip:] + shift, found.ends[skip:] + shift)


def _spaces_a_beginning(tokenizer: PreTrainedTokenizerBase) -> bool:
    alone = tokenizer.encode("a", add_special_tokens=False)
    after = tokenizer.encode(f"{tokenizer.eos_token}a", add_special_tokens=False)
    return list(after[1:]) != list(alone)
