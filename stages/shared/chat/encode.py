"""The one way to turn a rendered conversation into tokens.

What a message says can never become a control token, and so never a turn: where a message holds
the string of one, everything between the template's own control tokens is encoded as plain text.
"""

import copy
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from stages.shared.chat import spelling
from stages.shared.chat.conversation import Message, RejectedRow
from stages.shared.chat.encoded import Encoded, Joined, join
from stages.shared.chat.templates import Rendered, Span, Template
from stages.shared.chat.tokenizer import control_pattern
from stages.shared.chat.tokenizer import control_tokens as control_strings


def encode(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Rendered]
) -> list[Encoded | RejectedRow]:
    """Encode rendered conversations, in the tokenizer's own threads.

    Returns:
        Of each the tokens, those that `apply_chat_template` gives except where a message holds the
        string of a control token; or, where the tokenizer makes a control token even of plain
        text, the reason why it cannot be used.
    """
    return finish(tokenizer, batch, begin(tokenizer, batch))


def begin(tokenizer: PreTrainedTokenizerBase, batch: Sequence[Rendered]) -> list[Encoding]:
    """What of `encode` is the tokenizer's own work, outside Python's lock; in any thread."""
    return _ask(_backend(tokenizer), [rendered.text for rendered in batch])


def finish(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Rendered], begun: Sequence[Encoding]
) -> list[Encoded | RejectedRow]:
    """What else there is to `encode`, while another thread may begin the next batch."""
    whole = _read(_backend(tokenizer), [rendered.text for rendered in batch], begun)
    forged = _forged(tokenizer, batch, whole)
    return [
        _encode_apart(tokenizer, batch[i]) if i in forged else one for i, one in enumerate(whole)
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
        RejectedRow: it cannot be rendered or encoded; no conversation that `prepare` accepted.
    """
    [found] = encode(tokenizer, [template.render(messages, prompt=True)])
    if isinstance(found, RejectedRow):
        raise found
    return [int(token) for token in found.input_ids]


def _forged(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Rendered], encoded: Sequence[Encoded]
) -> set[int]:
    """The conversations in which a control token holds a character of a message."""
    joined = join([rendered.text for rendered in batch], encoded)
    control = control_tokens(tokenizer, joined).nonzero()[0]
    contents = joined.spans([rendered.contents for rendered in batch])
    inside = joined.tokens[control].holding(contents[contents[:, 0] < contents[:, 1]])
    return set((joined.edges.searchsorted(control[inside], side="right") - 1).tolist())


def control_tokens(tokenizer: PreTrainedTokenizerBase, joined: Joined) -> np.ndarray:
    """Which tokens are control tokens, bool [tokens].

    The one for what is unknown is none where it stands for other characters than its own.
    """
    known = tokenizer.convert_tokens_to_ids(sorted(control_strings(tokenizer)))
    tokens = joined.tokens
    control = np.isin(tokens.input_ids, known)
    for at in (control & (tokens.input_ids == tokenizer.unk_token_id)).nonzero()[0]:
        said = joined.text[tokens.starts[at] : tokens.ends[at]]
        control[at] = said == tokenizer.unk_token
    return control


def _controls(pattern: re.Pattern[str], rendered: Rendered) -> list[Span]:
    """Where the template's own control tokens stand."""
    edges = [0, *(at for span in rendered.contents for at in span), len(rendered.text)]
    between = zip(edges[::2], edges[1::2], strict=True)
    return [m.span() for a, b in between for m in pattern.finditer(rendered.text, a, b)]


def _backend(tokenizer: PreTrainedTokenizerBase, *, plain: bool = False) -> Tokenizer:
    """What encodes whole texts; `plain` makes ordinary text of the strings of control tokens."""
    backend = tokenizer.backend_tokenizer
    if plain:  # a copy: of the one that another thread may be using no setting changes
        backend = _copy(backend, backend.get_vocab_size(with_added_tokens=True))
    # To set something waits for that thread, and so is done only where it is not so yet.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != plain:
        backend.encode_special_tokens = plain
    return backend


@lru_cache(maxsize=1)
def _copy(backend: Tokenizer, size: int) -> Tokenizer:
    return copy.deepcopy(backend)


def _ask(backend: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    # Asked directly: transformers would turn each answer into lists that nobody reads.
    ask = backend.encode_batch if spelling.of(backend) is None else backend.encode_batch_fast
    return ask(texts, add_special_tokens=False)


def _read(backend: Tokenizer, texts: Sequence[str], asked: Sequence[Encoding]) -> list[Encoded]:
    """Tokens, and the characters that they stand for."""
    spelt = spelling.of(backend)
    if spelt is None:
        return [_tiled(one) for one in asked]
    read = spelt.read([one.ids for one in asked], texts)
    # A text that is not what its tokens spell is encoded again, and its characters asked for.
    others = [text for text, one in zip(texts, read, strict=True) if one is None]
    again = iter(backend.encode_batch(others, add_special_tokens=False))
    return [_tiled(next(again)) if one is None else one for one in read]


def _tiled(found: Encoding) -> Encoded:
    """Close the gaps: some tokenizers leave the white space before a word out of its span."""
    ids = np.array(found.ids, dtype=np.int32)
    spans = np.fromiter(chain.from_iterable(found.offsets), np.int32, 2 * len(ids)).reshape(-1, 2)
    starts, ends = spans.T
    np.minimum(starts[1:], ends[:-1], out=starts[1:])
    starts[:1] = 0
    return Encoded(ids, starts, ends)


def _encode_apart(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> Encoded | RejectedRow:
    """Encode, piece by piece, all but the template's own control tokens as plain text."""
    pattern = control_pattern(tokenizer)
    unknown = {tokenizer.unk_token} - {tokenizer.eos_token}  # it may stand for a character
    control = sorted(control_strings(tokenizer) - unknown)
    control_ids = tokenizer.convert_tokens_to_ids(control)
    pieces: list[Encoded] = []
    at = 0
    for start, end in [*_controls(pattern, rendered), (len(rendered.text), 0)]:
        if start > at:
            plain = _encode_plain(tokenizer, rendered.text[at:start], at)
            if np.isin(plain.input_ids, control_ids).any():
                return RejectedRow("the tokenizer makes a control token of a message's plain text")
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
    backend, texts = _backend(tokenizer, plain=True), [before + text]
    [found] = _read(backend, texts, _ask(backend, texts))
    shift = at - len(before)
    return Encoded(found.input_ids[skip:], found.starts[skip:] + shift, found.ends[skip:] + shift)


def _spaces_a_beginning(tokenizer: PreTrainedTokenizerBase) -> bool:
    alone = tokenizer.encode("a", add_special_tokens=False)
    after = tokenizer.encode(f"{tokenizer.eos_token}a", add_special_tokens=False)
    return list(after[1:]) != list(alone)
