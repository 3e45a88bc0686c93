"""A model of random weights, a tokenizer and conversations, in folders as stages leave them.

Nothing is fetched: whoever reads models and conversations from a folder, a peer too, can be
measured on sizes whose weights are not here. The weights are made and quantized a layer at a time
(`benchmarks.random_quantized`); in memory and on disk they are NF4 with double quantization.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerFast

from benchmarks.random_quantized import qlora_model


def write_model(config: PretrainedConfig, folder: Path, device: torch.device) -> Path:
    """Write a quantized model that transformers loads.

    Args:
        config: of the model; its weights are drawn at random.
        folder: a new one.
        device: that quantizes.
    """
    folder.mkdir(parents=True)
    base = qlora_model(config, 1, device).unload()
    state = {name: value.cpu().contiguous() for name, value in base.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(base).__name__]
    config.dtype = torch.bfloat16
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()
    config.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of three words: the conversations are tokens already, and want an end."""
    words = {"<pad>": 0, "<end>": 1, "<unknown>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unknown>")),  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        eos_token="<end>",  # noqa: S106
        unk_token="<unknown>",  # noqa: S106
    ).save_pretrained(folder)
    return folder


def write_conversations(folder: Path, lengths: Sequence[int], vocabulary: int) -> Path:
    """Write both splits: conversations of random tokens, all of them learnt but the first."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, of in (("train", lengths), ("eval", lengths[:1])):
        ids = [random.integers(3, vocabulary, length) for length in of]
        masks = [np.arange(length) > 0 for length in of]
        pq.write_table(
            pa.table({"input_ids": ids, "loss_mask": masks}), folder / f"{split}.parquet"
        )
    return folder
