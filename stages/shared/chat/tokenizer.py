"""Tokenizer of the model: loading, special tokens, automatic BOS and EOS."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tokenizer is local

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages.shared.core import files
from stages.shared.core.bounds import without_panic_output
from stages.shared.core.errors import UserError, reading


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer; a slow one, without character offsets, is a `UserError`."""
    (folder / "tokenizer_config.json").open().close()  # transformers would ask the hub
    files.require_json(folder)
    with reading(folder), without_panic_output():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: {type(tokenizer).__name__} is a slow tokenizer, without character offsets. "
            "Convert it to tokenizer.json, or choose another model."
        )
    return tokenizer


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """BOS as text, read from the tokenizer's output: its config may differ. Often empty."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    count = (*encoded["special_tokens_mask"], 0).index(0)
    prefix = "".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"][:count]))
    if tokenizer.encode(prefix, add_special_tokens=False) != encoded["input_ids"][:count]:
        raise UserError(
            f"models/tokenizer: puts {prefix!r} before every text, but does not read it as a token "
            "where a template writes it. Mark it as special in tokenizer.json."
        )
    return prefix


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[str], frozenset[str]]:
    """Added tokens, matched before a text is split: those flagged special, and the others."""
    added = tokenizer.added_tokens_decoder.values()
    special = frozenset(token.content for token in added if token.special)
    return special, frozenset(token.content for token in added) - special


def pattern_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Pattern of any of the tokens; the longest match wins, as in tokenizers."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)))
