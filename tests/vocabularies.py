"""Tokenizers of other kinds than the tiny model's own, trained on the spot."""

from collections.abc import Callable, Sequence

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.tiny import CORPUS


def plain() -> PreTrainedTokenizerFast:
    """As GPT-2's: byte-level, with an end token and no other control token."""
    return byte_level("<|endoftext|>", pad_token="<|endoftext|>")


def byte_level(
    eos: str, *special: str, before: Sequence[str] = (), **tokens: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with these control tokens; it puts `before` before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(dict.fromkeys([eos, *special, *before])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    if before:
        bpe.post_processor = processors.Sequence([bpe.post_processor, around(bpe, before)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, **tokens)


def around(
    bpe: Tokenizer, before: Sequence[str], after: Sequence[str] = ()
) -> processors.TemplateProcessing:
    """A post-processor that adds control tokens before and after every text."""
    tokens = [(token, bpe.token_to_id(token)) for token in {*before, *after}]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=tokens,
    )


def spaced() -> PreTrainedTokenizerFast:
    """A space before the first word of a text and only there, `<s>` and `</s>`."""
    bpe = _sentencepiece(["<unk>", "<s>", "</s>"])
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _sentencepiece(special: list[str]) -> Tokenizer:
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=[chr(code) for code in range(32, 127)] + ["\n"],
        show_progress=False,
    )
    bpe.train_from_iterator([*CORPUS, "two\nfour"], trainer)
    return bpe


def llama2() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral 7B's: `<s>`, and a space before whatever follows a control token."""
    bpe = _sentencepiece(["<unk>", "<s>", "</s>"])
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.pre_tokenizer = None
    bpe.post_processor = around(bpe, ["<s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def llama3() -> PreTrainedTokenizerFast:
    """As Llama 3's and Mistral NeMo's: byte-level, `TemplateProcessing` puts the first token."""
    made = byte_level(
        "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", before=["<|begin_of_text|>"]
    )
    made.bos_token = "<|begin_of_text|>"
    return made


def gemma() -> PreTrainedTokenizerFast:
    """As Gemma's: `<bos>`, no space before a text; role tokens of its own."""
    bpe = _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"])
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Replace(" ", "▁"), None
    bpe.post_processor = around(bpe, ["<bos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def opt() -> PreTrainedTokenizerFast:
    """As OPT's: the token that begins a text ends it too."""
    made = byte_level("</s>", before=["</s>"])
    made.bos_token = "</s>"
    return made


def glm() -> PreTrainedTokenizerFast:
    """As GLM's: two tokens before every text, and no `bos_token`."""
    return byte_level("<|endoftext|>", "<|user|>", before=["[gMASK]", "<sop>"])


def misnamed() -> PreTrainedTokenizerFast:
    """Its configuration names another first token than the one it puts."""
    made = byte_level("</s>", "<|startoftext|>", before=["<s>"])
    made.bos_token = "<|startoftext|>"
    return made


def embedding() -> PreTrainedTokenizerFast:
    """Puts a token after every text as well."""
    made = llama3()
    backend = made.backend_tokenizer
    backend.post_processor = around(backend, ["<|begin_of_text|>"], ["<|end_of_text|>"])
    return made


# Each with the text of what it puts before a text by itself.
FAMILIES: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "llama2": (llama2, "<s>"),
    "llama3": (llama3, "<|begin_of_text|>"),
    "gemma": (gemma, "<bos>"),
    "opt": (opt, "</s>"),
    "glm": (glm, "[gMASK]<sop>"),
    "misnamed": (misnamed, "<s>"),
    "embedding": (embedding, "<|begin_of_text|>"),
    "gpt2": (plain, ""),
    "spaced": (spaced, ""),
}
