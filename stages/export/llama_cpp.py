"""Architectures and tokenizers in llama.cpp's terms, for the metadata of a GGUF file.

llama.cpp knows how a text is cut by a name (`tokenizer.ggml.pre`), and not by an expression as
tokenizer.json does; a tokenizer whose name is not known is refused, as it would get other tokens.
Sources: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py and src/llama-vocab.cpp; the
package `gguf`.
"""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH, TokenType

from stages.shared.core import files

EXPERT = re.compile(r"\.experts\.(\d+)\.")
# transformers' model_type → llama.cpp's architecture, and whether its rotary pairs are neighbours
_ARCHITECTURES = {
    "llama": (MODEL_ARCH.LLAMA, True),
    "mistral": (MODEL_ARCH.LLAMA, True),
    "qwen2": (MODEL_ARCH.QWEN2, False),
    "qwen3": (MODEL_ARCH.QWEN3, False),
    "mixtral": (MODEL_ARCH.LLAMA, True),
    "qwen3_moe": (MODEL_ARCH.QWEN3MOE, False),
}
# Keys of each type of rotary embedding that llama.cpp computes the same
_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_ROPES: dict[str, set[str]] = {"default": set(), "linear": {"factor"}, "llama3": _LLAMA3}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WITH_REGEX, _BYTES_ALONE = ("ByteLevel", True), ("ByteLevel", False)
# Steps of the pre-tokenizer → llama.cpp's name
_PRE_TOKENIZERS: dict[tuple[Any, ...], str] = {
    (("Digits", True), _WITH_REGEX): "smollm",
    (_WITH_REGEX,): "gpt-2",
    (("Split", _QWEN2), _BYTES_ALONE): "qwen2",
    (("Split", _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), _BYTES_ALONE): "llama-bpe",
    (("Split", _TEKKEN), _BYTES_ALONE): "tekken",
}
_IGNORE_MERGES = ("llama-bpe", "tekken")  # a word that is a token is one, whatever the merges
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class Unsupported(ValueError):  # noqa: N818  (about a model, not an error of the program)
    """A model or adapter that a format cannot hold; the message is the reason."""


class Architecture:
    """Architecture of a config.json; raises `Unsupported`."""

    def __init__(self, config: dict[str, Any]) -> None:
        kind = config["model_type"]
        if kind not in _ARCHITECTURES:
            raise Unsupported(f"{kind} is none of {', '.join(_ARCHITECTURES)}")
        self._arch, self._permuted = _ARCHITECTURES[kind]
        if config.get("hidden_act", "silu") != "silu":
            raise Unsupported(f"its hidden_act is {config['hidden_act']}, and not silu")
        if kind.startswith("qwen3") and config.get("attention_bias"):
            raise Unsupported(f"llama.cpp has no attention_bias for {kind}")
        if kind == "qwen3_moe" and not config.get("norm_topk_prob"):
            raise Unsupported("its norm_topk_prob is false, and llama.cpp's experts sum to one")
        self.config = config
        self.name = gguf.MODEL_ARCH_NAMES[self._arch]
        rope = self.rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        self.rope_type = rope.get("rope_type") or rope.get("type") or "default"
        if self.rope_type not in _ROPES:
            raise Unsupported(f"its rope_type is {self.rope_type}")
        known = {"rope_theta", "rope_type", "type", *_ROPES[self.rope_type]}
        known |= {"partial_rotary_factor"} if rope.get("partial_rotary_factor") == 1 else set()
        if extra := {key for key in rope.keys() - known if rope[key] is not None}:
            raise Unsupported(f"its rotary embedding has {', '.join(sorted(extra))}")
        self.theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
        self.heads = config["num_attention_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self._names = gguf.get_tensor_name_map(self._arch, config["num_hidden_layers"])

    @property
    def context_length(self) -> int:
        """Tokens up to which llama.cpp computes the same: it has no sliding window for these."""
        config, window = self.config, self.config.get("sliding_window")
        slides = config["model_type"] in ("mistral", "mixtral")
        slides = slides or "sliding_attention" in (config.get("layer_types") or ())
        positions = int(config["max_position_embeddings"])
        return min(positions, window) if window and slides else positions

    def tensor_name(self, key: str) -> str:
        """llama.cpp's name of a parameter, or of a module; experts of a layer have one."""
        key = EXPERT.sub(".experts.", key).replace(".mlp.experts.w", ".block_sparse_moe.experts.w")
        name = self._names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise Unsupported(f"{self.name} has no tensor for {key}")
        return str(name)

    def reorder(self, key: str, rows: np.ndarray, *, back: bool = False) -> np.ndarray:
        """Rows of the query and key projections, [heads · head_dim, …], in llama.cpp's order.

        Its rotary embedding of Llama turns the pairs (2i, 2i + 1), transformers' (i, i + half). Of
        an adapter, B gives these rows.
        """
        projects = (".q_proj" in key or ".k_proj" in key) and "lora_A" not in key
        if not (self._permuted and projects):
            return rows
        pairs = (self.head_dim // 2, 2) if back else (2, self.head_dim // 2)
        return rows.reshape(-1, *pairs, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    def add_hyperparameters(self, writer: gguf.GGUFWriter) -> None:
        """Add the sizes, the norm's epsilon and the rotary embedding."""
        config = self.config
        writer.add_vocab_size(config["vocab_size"])
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        if "num_experts_per_tok" in config:
            writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
            writer.add_expert_used_count(config["num_experts_per_tok"])
            if width := config.get("moe_intermediate_size"):
                writer.add_expert_feed_forward_length(width)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(config.get("num_key_value_heads") or self.heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(self.theta)
        if self.rope_type == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.rope["factor"])

    def rope_divisors(self) -> np.ndarray | None:
        """Divisors of Llama 3's rotary frequencies, fp32 [head_dim / 2]; None for other types.

        Source: transformers, modeling_rope_utils.py, `_compute_llama3_parameters`.
        """
        if self.rope_type != "llama3":
            return None
        rope, powers = self.rope, np.arange(0, self.head_dim, 2) / self.head_dim
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] / (2 * np.pi * self.theta**powers)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


class Vocabulary:
    """Byte-level or sentencepiece BPE vocabulary of a tokenizer.json; raises `Unsupported`."""

    def __init__(self, folder: Path) -> None:
        tokenizer = files.read_json(folder / "tokenizer.json")
        self._added, model = tokenizer["added_tokens"], tokenizer["model"]
        self.texts: dict[int, str] = {i: text for text, i in model["vocab"].items()}
        self.texts |= {token["id"]: token["content"] for token in self._added}
        cuts = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
        normalizer = [part["type"] for part in _parts(tokenizer.get("normalizer"), "normalizers")]
        if model["type"] != "BPE":
            raise Unsupported(f"its tokenizer is {model['type']}, and not BPE")
        for token in self._added:
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise Unsupported(f"its token {token['content']!r} takes white space with it")
        merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        self._merges: list[tuple[str, str]] = [(left, right) for left, right in merges]
        self._unknown = model.get("unk_token")
        self._scores: dict[str, float] | None = None  # of byte-level BPE none
        self._pre, self._adds_space = "default", False
        if model.get("byte_fallback"):
            self._scores = self._sentencepiece_scores(model["vocab"])
            self._adds_space = _adds_space(normalizer, cuts)
        else:
            self._pre = _pre_tokenizer(normalizer, cuts, bool(model.get("ignore_merges")))

    def _sentencepiece_scores(self, vocabulary: dict[str, int]) -> dict[str, float]:
        """Scores by token; the neighbours that merge into the highest are merged first.

        llama.cpp merges any two neighbours whose text is a token, tokenizer.json only those that
        it lists: they agree where it lists all, token by token, as a conversion from sentencepiece
        does.
        """
        if not vocabulary.keys() >= set(_BYTES):
            raise Unsupported("its tokenizer lacks tokens for single bytes")
        ranks: dict[str, list[int]] = {}
        for rank, (left, right) in enumerate(self._merges):
            ranks.setdefault(left + right, []).append(rank)
        listed = set(self._merges)
        special = {token["content"] for token in self._added}.union(_BYTES)
        for token in vocabulary.keys() - special:
            for cut in range(1, len(token)):
                pair = (token[:cut], token[cut:])
                mergeable = all(len(part) == 1 or part in vocabulary for part in pair)
                if mergeable and pair not in listed:
                    raise Unsupported("its tokenizer's merges are not those of sentencepiece")
        if any(own[-1] - own[0] != len(own) - 1 for own in ranks.values()):
            raise Unsupported("its tokenizer's merges are not in the order of sentencepiece")
        return {token: -float(own[0]) for token, own in ranks.items()}

    def add(self, writer: gguf.GGUFWriter, size: int, special: dict[str, str]) -> None:
        """Add `size` tokens, the rows of the embedding; `special` has `bos`, `eos`, `eot`, …."""
        texts = [self.texts.get(i, f"[PAD{i}]") for i in range(size)]
        kinds = {} if self._scores is None else dict.fromkeys(_BYTES, TokenType.BYTE)
        for token in self._added:
            kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            kinds[token["content"]] = kind
        if self._scores is not None:
            kinds[self._unknown] = TokenType.UNKNOWN
        kinds |= {text: TokenType.UNUSED for i, text in enumerate(texts) if i not in self.texts}
        writer.add_tokenizer_model("gpt2" if self._scores is None else "llama")
        writer.add_tokenizer_pre(self._pre)
        writer.add_token_list(texts)
        writer.add_token_types([kinds.get(text, TokenType.NORMAL) for text in texts])
        if self._scores is None:
            writer.add_token_merges([" ".join(merge) for merge in self._merges])
        else:
            lowest = -float(len(self._merges) + 1)
            writer.add_token_scores([self._scores.get(text, lowest) for text in texts])
        writer.add_add_space_prefix(self._adds_space)
        ids = {text: i for i, text in enumerate(texts)}
        for name, text in special.items():
            if text not in ids:
                raise Unsupported(f"its token {text!r} has no row in the embedding")
            getattr(writer, f"add_{name}_token_id")(ids[text])
        # The chat template writes them: llama.cpp would add them once more.
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)


def _parts(described: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Steps of a normalizer or pre-tokenizer, which may be one, several or none."""
    if described is None:
        return []
    return list(described[key]) if described["type"] == "Sequence" else [described]


def _pre_tokenizer(normalizer: list[str], cuts: list[dict[str, Any]], ignore_merges: bool) -> str:
    """llama.cpp's name of a byte-level pre-tokenizer."""
    if normalizer not in ([], ["NFC"]):  # Qwen's; llama.cpp leaves it out
        raise Unsupported(f"llama.cpp has no normalizer {', '.join(normalizer)}")
    name = _PRE_TOKENIZERS.get(tuple(map(_step, cuts)))
    if name is None or ignore_merges != (name in _IGNORE_MERGES):
        raise Unsupported("llama.cpp's name for the way its tokenizer cuts text is not known")
    return name


def _step(step: dict[str, Any]) -> tuple[str, Any]:
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return kind, step.get("use_regex", True)
    if kind == "Digits":
        return kind, step.get("individual_digits")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return kind, step["pattern"].get("Regex")
    return kind, None


def _adds_space(normalizer: list[str], cuts: list[dict[str, Any]]) -> bool:
    """Whether sentencepiece puts a space before a text, also one after a control token."""
    if normalizer in (["Prepend", "Replace"], ["Replace"]) and not cuts:
        return normalizer[0] == "Prepend"
    if not normalizer and [cut["type"] for cut in cuts] == ["Metaspace"]:
        # "first" is before the very first token, where chat templates write a control token.
        return bool(cuts[0].get("prepend_scheme") == "always")
    raise Unsupported("its tokenizer treats spaces as no sentencepiece model of Llama's does")
