"""The tokenizer, and which of its tokens control a conversation."""

import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tokenizer lies here: nothing is asked of the hub

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages.shared.core.errors import UserError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder that a stage wrote.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot say which characters a token stands for.
    """
    (folder / "tokenizer_config.json").open().close()  # transformers would ask the hub
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: {type(tokenizer).__name__} is a slow tokenizer, which cannot tell the "
            "characters of a token; expected one with a tokenizer.json; convert it or choose "
            "another model"
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
            "where a template writes it. Mark it as special in tokenizer.json"
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


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The tokens that stand outside ordinary text: their string is one token, whatever is around.

    Only those that `split_special_tokens` turns back into plain text are among them. A token that
    was added to the vocabulary but not declared special is a word like any other.
    """
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(token.content for token in added if token.special)


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches a control token; where two begin at one place, the longer, as tokenizers do."""
    longest_first = sorted(control_tokens(tokenizer), key=lambda token: (-len(token), token))
    return re.compile("|".join(re.escape(token) for token in longest_first))
