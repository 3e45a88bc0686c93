"""GGUF, llama.cpp's format, into safetensors.

The weights of such a file were usually quantized before we see them. They are dequantized to bf16
here: how they are stored changes, and what was lost is not brought back.
"""

import sys
from pathlib import Path

from stages.fetch_model.checkpoint import Checkpoint


def to_safetensors(gguf: Path, folder: Path) -> Checkpoint:
    """Write the model and the tokenizer that a GGUF file holds into `folder`, which is made."""
    import torch  # noqa: PLC0415  (seconds that a wrong parameter need not wait for)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    transformers_logging.disable_progress_bar()  # of what takes no time; the long one stays
    where = {"gguf_file": gguf.name, "local_files_only": True}
    _say(f"{gguf.name}: reading the tokenizer, which takes some seconds")
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
    _say(f"{gguf.name}: reading the weights, half a minute for 135 million parameters")
    # Without `dequantize`, transformers keeps the weights packed, and cannot save them.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        **where,
    )
    model.save_pretrained(folder)
    return Checkpoint(folder, gguf.name, ours=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
