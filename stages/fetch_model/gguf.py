"""GGUF (llama.cpp's format) to safetensors in bf16; earlier quantization errors remain."""

import sys
from pathlib import Path

from stages.fetch_model.checkpoint import Checkpoint, gather
from stages.shared.core.display import panics_untold
from stages.shared.core.errors import reading

# Tokenizers that split digits before BPE (llama-vocab.cpp), which transformers does not restore:
# without it, SmolLM2 needs 1.8 % more nats on 12 English texts with numbered lists.
_LONE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def to_safetensors(gguf: Path, folder: Path) -> Checkpoint:
    """Write the model and tokenizer of a GGUF file to a new folder."""
    with reading(gguf.name, "Choose another GGUF file."):
        _convert(gguf, folder)
    return gather([path.name for path in folder.iterdir()], gguf.name, lambda _: folder)


def _convert(gguf: Path, folder: Path) -> None:
    import torch  # noqa: PLC0415  (seconds that a wrong parameter need not wait for)
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415
    from transformers.integrations.gguf import read_gguf_metadata  # noqa: PLC0415
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    transformers_logging.disable_progress_bar()
    source = {"gguf_file": gguf.name, "local_files_only": True}
    print(f"{gguf.name}: reading the tokenizer, which takes some seconds", file=sys.stderr)
    with panics_untold():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    metadata, _ = read_gguf_metadata(gguf)
    if metadata.get("tokenizer.ggml.pre") in _LONE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
    print(
        f"{gguf.name}: reading the weights, half a minute for 135 million parameters",
        file=sys.stderr,
    )
    # Without `dequantize`, transformers keeps the weights packed and cannot save them.
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=dequantize, dtype=torch.bfloat16, **source
    )
    model.save_pretrained(folder)
