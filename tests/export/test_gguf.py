"""GGUF files in llama.cpp itself: tokens, templates and predictions are those of transformers."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from stages.export import llama_cpp
from stages.export.gguf_file import ModelFormat
from stages.export.llama_cpp import Architecture, Unsupported, Vocabulary
from stages.shared.chat import templates
from stages.shared.core import files
from stages.shared.model import loading
from stages.shared.weights.checkpoint import Weights
from tests import tiny, vocabularies
from tests.architectures import MIXTURES, saved
from tests.llama import opened
from tests.tiny import CORPUS

ROPE = {"rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": {"rope_type": "llama3"} | ROPE | LLAMA3}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear"} | ROPE}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mixtral": ("mixtral", MIXTURES["mixtral"] | {"sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", MIXTURES["qwen3_moe"] | {"norm_topk_prob": True}),
}


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def smollm() -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return made


def qwen2() -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.backend_tokenizer.pre_tokenizer = split(llama_cpp._QWEN2)
    made.add_tokens(["<think>"])  # not special: a token even where control tokens are text
    return made


def sentencepiece(normalizer: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2's, converted from sentencepiece: all merges, bytes for what it lacks."""
    trained = vocabularies.llama2().backend_tokenizer
    control = ["<unk>", "<s>", "</s>"]
    tokens = [*control, *llama_cpp._BYTES]
    tokens += [t for t, _ in sorted(trained.get_vocab().items(), key=lambda x: x[1])][3:]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = generate_merges(vocab, skip_tokens=control)
    options = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if not normalizer:
        bpe.normalizer = None
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bpe.add_special_tokens(control)
    bpe.post_processor = vocabularies.around(bpe, ["<s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def odd_strings() -> list[str]:
    """200 texts of many scripts, digits, white space, emoji, and control tokens as text."""
    rng = random.Random(0)
    ranges = [(32, 126), (0xA0, 0x24F), (0x370, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F)]
    ranges += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F6FF), (0x2000, 0x206F)]
    ranges += [(0x300, 0x36F), (9, 13), (0x660, 0x669), (0x2150, 0x218B)]
    made = ["", " ", "\n", "\n\n\n1", "  12 345\t67", "a\r\nb", "don't WE'LL I'm", "e\u0301 👩‍👩‍👧"]
    made += [
        "<|im_start|>user\nHi<|im_end|>",
        "<s>two</s> four",
        "<think> is </think>",
        "１２ ²³ Ⅷ",
    ]
    made += [*CORPUS, "  two  plus   two ", " four", "four "]
    while len(made) < 200:
        low, high = rng.choice(ranges)
        spans = [(low, high), (32, 126), (97, 122)]
        length = rng.randint(1, 60)
        made.append("".join(chr(rng.randint(*rng.choice(spans))) for _ in range(length)))
    return made


def written(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    besides: dict[str, Any],
    quantization: str = "F16",
) -> Path:
    """A random model with a tokenizer, as a file; returns the folder."""
    if not (folder / "config.json").exists():
        saved(folder, kind, besides | {"vocab_size": len(tokenizer) + 3})
    tokenizer.save_pretrained(folder)
    form = templates.make("chatml", tokenizer).format()
    files.write_text(folder / "format.json", form.model_dump_json())
    stored = GGMLQuantizationType[quantization]
    ModelFormat(folder, form).write(folder / "model.gguf", Weights(folder), stored)
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_predicts_as_transformers(tmp_path: Path, name: str) -> None:
    kind, besides = ARCHITECTURES[name]
    folder = written(tmp_path, tiny.tokenizer(), kind, besides)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(0)
    ids = [rng.randrange(3, 384) for _ in range(90)]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    path = folder / "model.gguf"
    with opened(path) as llama:
        predicted = {length: llama.next_token(ids[:length]) for length in (5, 17, 33, 60, 90)}
    predicted = {length: top for length, top in predicted.items() if top}
    assert len(predicted) > 1
    for length, top in predicted.items():
        assert next(iter(top)) == expected[length - 1].argmax()
        for token, logp in top.items():
            assert logp == pytest.approx(expected[length - 1, token].item(), abs=0.05)
    again = loading.load_model(folder, torch.device("cpu"), torch.float32)
    for parameter in again.parameters():
        parameter.data.zero_()
    ModelFormat(folder, templates.read_format(folder / "format.json")).fill(again, path)
    with torch.inference_mode():
        read_back = again(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert torch.allclose(read_back, expected, atol=0.05)


@pytest.mark.parametrize("quantization", ["F16", "Q8_0"])
def test_greedy_replies_end_as_transformers(tmp_path: Path, quantization: str) -> None:
    made = tiny.model()
    rows = made.model.embed_tokens.weight.data
    rows[2] = 3 * rows[100]  # the end token, as padding without a row, is likely now and then
    made.save_pretrained(tmp_path)
    folder = written(tmp_path, tiny.tokenizer(), "llama", {}, quantization)
    rng, ends = random.Random(0), {"transformers": 0, "llama.cpp": 0}
    with opened(folder / "model.gguf") as llama:
        for _ in range(16):
            ids = [rng.randrange(3, 384) for _ in range(8)]
            # llama.cpp also ends at `<|endoftext|>`, whatever the file says.
            options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": [0, 2]}
            output = made.generate(torch.tensor([ids]), **options)
            ends["transformers"] += bool({0, 2} & {*output[0, len(ids) :].tolist()})
            ends["llama.cpp"] += llama.complete(ids, 12)["stop_type"] == "eos"
    assert 2 < ends["transformers"] == ends["llama.cpp"] < 16


@pytest.mark.parametrize("make", [tiny.tokenizer, smollm, qwen2, vocabularies.llama3])
def test_llama_cpp_reads_the_same_byte_level_tokens(
    tmp_path: Path, make: Callable[[], PreTrainedTokenizerFast]
) -> None:
    tokenizer = make()
    folder = written(tmp_path, tokenizer, "llama", {})
    require_same_tokens(folder, tokenizer)


@pytest.mark.parametrize("normalizer", [True, False])
def test_llama_cpp_reads_the_same_sentencepiece_tokens(tmp_path: Path, normalizer: bool) -> None:
    tokenizer = sentencepiece(normalizer)
    folder = written(tmp_path, tokenizer, "llama", {})
    require_same_tokens(folder, tokenizer, before="<s>")


def require_same_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast, before: str = "") -> None:
    """Of odd strings, read with control tokens and as plain text; and of a conversation."""
    form = templates.read_format(folder / "format.json")
    with opened(folder / "model.gguf") as llama:
        for text in odd_strings():
            for special in (True, False):
                if before and not special:
                    continue
                ids = tokenizer.encode(
                    before + text, add_special_tokens=False, split_special_tokens=not special
                )
                assert llama.tokenize(before + text, special=special) == ids, repr(text)
        talk = [{"role": "user", "content": "What is 2?"}, {"role": "assistant", "content": "4"}]
        talk += [{"role": "user", "content": " two\n"}]
        for messages in (talk, [{"role": "system", "content": "Be brief."}, *talk]):
            expected = tokenizer.apply_chat_template(
                messages,
                chat_template=form.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
            assert llama("/apply-template", {"messages": messages})["prompt"] == expected


def test_vocabulary_refuses_what_llama_cpp_reads_otherwise(tmp_path: Path) -> None:
    stripping = tiny.tokenizer()
    stripping.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for tokenizer, reason in (
        (stripping, "cuts text"),
        (vocabularies.llama2(), "normalizer Prepend, Replace"),
        (vocabularies.gemma(), "normalizer Replace"),
    ):
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(Unsupported, match=reason):
            Vocabulary(tmp_path)
    sentencepiece().save_pretrained(tmp_path)
    described = files.read_json(tmp_path / "tokenizer.json")
    described["model"]["merges"].pop()
    files.write_json(tmp_path / "tokenizer.json", described)
    with pytest.raises(Unsupported, match="not those of sentencepiece"):
        Vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "gpt2 is none of llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type is dynamic"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "has partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is yarn"),
    ],
)
def test_architecture_names_what_it_cannot_hold(changes: dict[str, Any], reason: str) -> None:
    config = tiny.model().config.to_dict()
    with pytest.raises(Unsupported, match=reason):
        Architecture(config | changes)


def test_context_ends_at_the_sliding_window() -> None:
    config = tiny.model().config.to_dict()
    mistral = config | {"model_type": "mistral", "sliding_window": 16}
    assert Architecture(mistral).context_length == 16
    assert Architecture(config).context_length == 1024
