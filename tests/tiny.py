"""A language model small enough for a unit test: two layers, a tokenizer trained on the spot."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from stages.quantize.__main__ import Quantize

CORPUS = [
    "### Human: What is two plus two?### Assistant: Two plus two is four.\n4",
    "user assistant system [INST] [/INST] <<SYS>> <</SYS>> the of and to in is it for with",
    "¿Cuánto es dos más dos? Zwei und zwei ist vier. 二加二等于四。 два плюс два",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


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
    unknown, begin, end = special
    names = {"unk_token": unknown, "bos_token": begin, "eos_token": end, "pad_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def model(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """A Llama of about 250,000 parameters, with logits far enough apart for a clear top-1."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    ids = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = LlamaConfig(**sizes, **heads, **ids, initializer_range=0.2, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def save(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Write model (bf16) and tokenizer into one folder, like a user's own model."""
    model(seed, layers).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def quantization(
    precision: str, compute_dtype: str = "bf16", double_quant: bool = True
) -> Quantize:
    """The section `quantize`."""
    values = {"precision": precision, "compute_dtype": compute_dtype}
    return Quantize.model_validate(values | {"double_quant": double_quant})


def quantize(folder: Path, precision: str, seed: int = 0) -> Path:
    """Write the model in a precision of bitsandbytes, or cast."""
    base = folder.with_name("base")
    if not base.exists():
        save(base, seed)
    quantization = None
    if precision == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif precision in ("nf4", "fp4"):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=precision,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=quantization, device_map={"": "cpu"}
    ).save_pretrained(folder)
    return folder


def prepared(folder: Path, conversations: int = 24, held_out: int = 24) -> Path:
    """Write the outs of `prepare`, in ChatML: short questions whose answers a model can learn."""
    folder.mkdir(parents=True)
    encode = tokenizer().encode
    for split, first, count in (("train", 0, conversations), ("eval", conversations, held_out)):
        rows = []
        for index in range(first, first + count):
            question, answer = f"What is {index}?", f"It is {index}.\n{index}"
            prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            reply = f"{answer}<|im_end|>"
            ids, mask = encode(prompt), encode(reply)
            messages = [("user", question), ("assistant", answer)]
            rows.append(
                {
                    "conversation_id": f"{index:064x}",
                    "messages": [{"role": role, "content": text} for role, text in messages],
                    "text": f"{prompt}{reply}\n",
                    "input_ids": ids + mask,
                    "loss_mask": [False] * len(ids) + [True] * len(mask),
                    "text_bytes": len(reply.encode()),
                    "answer": str(index),
                    "language": "en" if index % 2 else "other",
                }
            )
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    form = {"schema_version": 1, "template": "chatml", "chat_template": CHATML}
    form |= {"eos_token": "<|im_end|>", "stop_ids": [2]}
    (folder / "format.json").write_text(json.dumps(form))
    return folder
