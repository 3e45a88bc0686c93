"""Tokenizer of a trained model or adapter: the model's own, with training's chat template."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages.shared.core import files
from stages.shared.core.bounds import panics_untold
from stages.shared.core.errors import reading


def save_tokenizer(
    source: Path, folder: Path, form: Mapping[str, Any], rows: int
) -> PreTrainedTokenizerBase:
    """Save the tokenizer of `source` to `folder` as training used it.

    It gets the chat template and end token of `form` (format.json); BOS, which the template writes,
    is added by nothing else; a padding token beyond the embedding's `rows` becomes the end token.
    """
    (source / "tokenizer_config.json").open().close()  # transformers would ask the hub
    files.require_json(source)
    with reading(source), panics_untold():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tokenizer.chat_template, tokenizer.eos_token = form["chat_template"], form["eos_token"]
    silenced = add_no_special_tokens(tokenizer)
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    # transformers 4 and llama.cpp read these.
    flags = {"add_bos_token": False, "add_eos_token": False} if silenced else {}
    if (legacy := getattr(tokenizer, "legacy", None)) is not None:
        flags["legacy"] = legacy  # decides on spaces after control tokens; transformers drops it
    with TemporaryDirectory(dir=folder) as scratch:
        tokenizer.save_pretrained(scratch)
        config = Path(scratch, "tokenizer_config.json")
        files.write_json(config, _readable_by_v4(files.read_json(config)) | flags)
        for file in Path(scratch).iterdir():
            file.replace(folder / file.name)  # a link's original stays as it is
    return tokenizer


def add_no_special_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Stop adding BOS and EOS, which a chat template writes itself; return whether it did."""
    added = any(tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"])
    if added:
        tokenizer.add_bos_token = tokenizer.add_eos_token = False  # rewrites the post-processor
    return added


def _readable_by_v4(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4.57 also reads, for the same token ids."""
    dropped = ("backend", "is_local", "local_files_only")
    config = {key: value for key, value in config.items() if key not in dropped}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
