"""GGUF, llama.cpp's format, into safetensors.

The weights of such a file were usually quantized before we see them. They are dequantized to bf16
here: how they are stored changes, and what was lost is not brought back.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stages.fetch_model.checkpoint import Checkpoint, gather
from stages.shared.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Vocabularies whose merges were learned with each digit standing alone (llama-vocab.cpp).
# transformers has no rule for these names: without one, 12 English texts with numbered lists cost
# SmolLM2 1.8 % more nats.
_LONE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def to_safetensors(gguf: Path, folder: Path) -> Checkpoint:
    """Write the model and the tokenizer that a GGUF file holds into `folder`, which is made.

    Raises:
        UserError: it is damaged, or of a kind that transformers does not read.
    """
    try:
        _convert(gguf, folder)
    except Exception as error:  # gguf, numpy and transformers raise whatever comes
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, and not of the file
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{gguf.name}: transformers cannot read it ({reason:.100}). Choose another GGUF file."
        ) from None
    return gather([path.name for path in folder.iterdir()], gguf.name, lambda _: folder)


def _convert(gguf: Path, folder: Path) -> None:
    import torch  # noqa: PLC0415  (seconds that a wrong parameter need not wait for)
    from transformers import AutoModelForCausalLM, GgufConfig  # noqa: PLC0415
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    transformers_logging.disable_progress_bar()  # of what takes no time; the long one stays
    print(f"{gguf.name}: reading the tokenizer, which takes some seconds", file=sys.stderr)
    _tokenizer(gguf).save_pretrained(folder)
    print(
        f"{gguf.name}: reading the weights, half a minute for 135 million parameters",
        file=sys.stderr,
    )
    # Without `dequantize`, transformers keeps the weights packed, and cannot save them.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    model.save_pretrained(folder)


def _tokenizer(gguf: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer that the file describes, which splits text as the model learned it."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415
    from transformers.integrations.gguf import read_gguf_metadata  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    metadata, _ = read_gguf_metadata(gguf)
    if metadata.get("tokenizer.ggml.pre") in _LONE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    return tokenizer
