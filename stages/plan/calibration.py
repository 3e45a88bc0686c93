"""How many operations a second this machine does on a block of the model: a short measurement."""

import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.plan import operations
from stages.shared.architecture import model_of
from stages.shared.tuning import Tuning
from stages.shared.weights.precision import DTYPES, autocast

TOKENS = 256
REPEATS = 3
SMALL_VOCABULARY = 256  # the head is no part of what is timed


def operations_per_second(config_path: Path, tuning: Tuning, device: torch.device) -> float:
    """Of one block with random, frozen, dense weights, forward and backward; the best of three.

    Quantized weights take a little longer: they are dequantized each time.

    Args:
        config_path: a `config.json`.
        tuning: whose compute dtype products run in.
        device: to measure.
    """
    config = AutoConfig.from_pretrained(config_path, trust_remote_code=False)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size = 1, SMALL_VOCABULARY
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    dtype = DTYPES[tuning.dense]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
        embeddings = torch.randn(1, TOKENS, text.hidden_size, dtype=dtype, requires_grad=True)
    best = min(_seconds(model, embeddings, device, dtype) for _ in range(REPEATS + 1))
    one_block = operations.of_token(model_of(model), Tuning("bf16", None), 1.0, TOKENS)
    return 2 * one_block.forward * TOKENS / best  # backward through frozen weights costs the same


def _seconds(
    model: torch.nn.Module, embeddings: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> float:
    started = time.perf_counter()
    with autocast(device, dtype):
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
    logits.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
