"""Tokenizers of the kinds of public model families, trained on the spot."""

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tests.tiny import CORPUS


def byte_level(
    eos: str, *special: str, before: Sequence[str] = (), **tokens: str
) -> PreTrainedTokenizerFast:
    """As GPT-2's and Llama 3's, with these control tokens; `before` stands before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    control = list(dict.fromkeys([eos, *special, *before]))
    bpe.train_from_iterator(CORPUS, _trainer(control, alphabet))
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    if before:
        bpe.post_processor = processors.Sequence([bpe.post_processor, around(bpe, before)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, **tokens)


def sentencepiece(
    *special: str, before: Sequence[str] = (), **tokens: str
) -> PreTrainedTokenizerFast:
    """As Llama 2's and Gemma's: spaces are `▁`, what the vocabulary lacks is `<unk>`."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    bpe.train_from_iterator([*CORPUS, "two\nfour"], _trainer(["<unk>", *special], alphabet))
    if before:
        bpe.post_processor = around(bpe, before)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", **tokens)


def _trainer(special: list[str], alphabet: list[str]) -> BpeTrainer:
    return BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )


def around(
    bpe: Tokenizer, before: Sequence[str], after: Sequence[str] = ()
) -> processors.TemplateProcessing:
    """A post-processor that adds control tokens before and after every text."""
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(token, bpe.token_to_id(token)) for token in {*before, *after}],
    )


def plain() -> PreTrainedTokenizerFast:
    """As GPT-2's: byte-level, with an end token and no other control token."""
    return byte_level("<|endoftext|>", pad_token="<|endoftext|>")


def spaced() -> PreTrainedTokenizerFast:
    """A space before the first word of a text and only there, `<s>` and `</s>`."""
    return sentencepiece("<s>", "</s>", bos_token="<s>", eos_token="</s>")


def llama2() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral 7B's: `<s>`, and a space before whatever follows a control token."""
    made = sentencepiece("<s>", "</s>", before=["<s>"], bos_token="<s>", eos_token="</s>")
    backend, replace = made.backend_tokenizer, normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    backend.pre_tokenizer = None
    return made


def gemma() -> PreTrainedTokenizerFast:
    """As Gemma's: `<bos>`, no space before a text, role tokens of its own."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    made = sentencepiece(*special, before=["<bos>"], bos_token="<bos>", eos_token="<eos>")
    made.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    made.backend_tokenizer.pre_tokenizer = None
    return made


def llama3() -> PreTrainedTokenizerFast:
    """As Llama 3's and Mistral NeMo's: byte-level, the first token by `TemplateProcessing`."""
    begin = "<|begin_of_text|>"
    return byte_level("<|eot_id|>", "<|end_of_text|>", before=[begin], bos_token=begin)


def embedding() -> PreTrainedTokenizerFast:
    """Adds a token after every text as well."""
    made = llama3()
    backend = made.backend_tokenizer
    backend.post_processor = around(backend, ["<|begin_of_text|>"], ["<|end_of_text|>"])
    return made


# Each with the tokens that it adds before every text.
FAMILIES: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "llama2": (llama2, "<s>"),
    "llama3": (llama3, "<|begin_of_text|>"),
    "gemma": (gemma, "<bos>"),
    "opt": (lambda: byte_level("</s>", before=["</s>"], bos_token="</s>"), "</s>"),
    "glm": (lambda: byte_level("<|end|>", before=["[gMASK]", "<sop>"]), "[gMASK]<sop>"),
    "misnamed": (lambda: byte_level("</s>", "<b>", before=["<s>"], bos_token="<b>"), "<s>"),
    "embedding": (embedding, "<|begin_of_text|>"),
    "qwen": (lambda: byte_level("<|im_end|>", "<|im_start|>"), ""),
    "spaced": (spaced, ""),
}
