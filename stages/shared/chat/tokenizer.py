"""The model's tokenizer: loading, special tokens, and what it puts around a text by itself."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tokenizer is local: the hub is not asked

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages.shared.core.errors import UserError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder that a stage wrote.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is a slow tokenizer, which gives no character offsets.
    """
    (folder / "tokenizer_config.json").open().close()  # transformers would ask the hub
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: {type(tokenizer).__name__} is a slow tokenizer, without character offsets. "
            "Convert it to tokenizer.json, or choose another model."
        )
    return tokenizer


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """BOS as text: the tokens that the tokenizer itself puts before every text; often none.

    Read off its output, since `bos_token` and `add_bos_token` of tokenizer_config.json may differ.

    Raises:
        UserError: written out, these tokens are not read as themselves.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    count = (*encoded["special_tokens_mask"], 0).index(0)
    prefix = "".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"][:count]))
    if tokenizer.encode(prefix, add_special_tokens=False) != encoded["input_ids"][:count]:
        raise UserError(
            f"models/tokenizer: puts {prefix!r} before every text, but does not read it as a token "
            "where a template writes it. Mark it as special in tokenizer.json."
        )
    return prefix


def add_no_special_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Stop the tokenizer from adding BOS or EOS by itself; whether it did.

    For a chat template that writes BOS: `tokenizer(text)` of a rendered text would double it, and
    put an EOS behind the generation prompt.
    """
    added = any(tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"])
    if added:
        tokenizer.add_bos_token = tokenizer.add_eos_token = False  # rewrites the post-processor
    return added


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[str], frozenset[str]]:
    """Tokens that are found in a text before it is split: those flagged special, and the others."""
    added = tokenizer.added_tokens_decoder.values()
    special = frozenset(token.content for token in added if token.special)
    return special, frozenset(token.content for token in added) - special


def pattern_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches one of some tokens; where two begin at one place, the longer, as tokenizers do."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)))
