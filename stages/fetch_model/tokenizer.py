"""A tokenizer in a folder of its own, which needs no model beside it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from stages.shared.core import files
from stages.shared.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
# Where it was loaded from, and code that came with it.
_NOT_KEPT = ("auto_map", "is_local", "local_files_only", "name_or_path")
_PROBE = "Two plus two is 4.\n\n\tДва и два — 四。 <|im_end|></s> def f(x): return x  # 🙂"


def install(source: Path, target: Path, name: str) -> None:
    """Load the tokenizer of a model's folder and save it into `target`.

    Which class a tokenizer has, transformers may read from the model's config; saved again, it says
    so itself. What was saved is loaded and compared.

    Raises:
        UserError: it cannot be loaded, needs code of its own, or has no end token.
    """
    if not any((source / file).is_file() for file in FILES):
        raise UserError(
            f"{name}: has no tokenizer; expected tokenizer.json and tokenizer_config.json beside "
            "the model; choose another model, or put its tokenizer there"
        )
    original = _load(source, name)
    if original.eos_token_id is None:
        raise UserError(
            f"{name}: its tokenizer has no eos_token, and a reply could not end; "
            "expected one; name it in tokenizer_config.json, or choose another model"
        )
    original.save_pretrained(target)
    config = target / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(config.read_text("utf-8")).items() if k not in _NOT_KEPT}
    files.write_json(config, kept)
    if _fingerprint(_load(target, name)) != _fingerprint(original):
        raise UserError(
            f"{name}: its tokenizer, saved by itself, encodes text in another way; "
            "expected one that needs no model beside it; choose another model"
        )


def _load(folder: Path, name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer  # noqa: PLC0415  (takes seconds)

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises no narrower kind
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}: has no tokenizer that transformers can load by itself ({reason:.160}); "
            "expected tokenizer.json and tokenizer_config.json; choose another model"
        ) from None


def _fingerprint(tokenizer: "PreTrainedTokenizerBase") -> tuple[object, ...]:
    return (
        tokenizer.encode(_PROBE),
        tokenizer.encode(_PROBE, split_special_tokens=True),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        len(tokenizer),
    )
