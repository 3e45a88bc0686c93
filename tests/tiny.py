"""A language model small enough for a unit test: two layers, a tokenizer trained on the spot."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "### Human: What is two plus two?### Assistant: Two plus two is four.\n4",
    "user assistant system [INST] [/INST] <<SYS>> <</SYS>> the of and to in is it for with",
    "¿Cuánto es dos más dos? Zwei und zwei ist vier. 二加二等于四。 два плюс два",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 384 tokens with the ChatML markers of SmolLM2."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )


def model(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """A Llama of about 250,000 parameters whose logits are far enough apart to have a top-1."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def save(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Write model (bf16) and tokenizer into one folder, as a user's own model would lie there."""
    model(seed, layers).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
