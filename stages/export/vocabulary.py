"""Vocabulary of a tokenizer in GGUF: tokens with types, merges or scores, the pre-tokenizer's name.

llama.cpp knows how a text is cut by a name (`tokenizer.ggml.pre`), and not by an expression as
tokenizer.json does; a tokenizer whose name is not known is refused, as it would get other tokens.
Source: https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from stages.export.architecture import Unsupported
from stages.shared.core import files

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
_NAMES: dict[tuple[Any, ...], str] = {
    (("Digits", True), _WITH_REGEX): "smollm",
    (_WITH_REGEX,): "gpt-2",
    (("Split", _QWEN2), _BYTES_ALONE): "qwen2",
    (("Split", _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), _BYTES_ALONE): "llama-bpe",
    (("Split", _TEKKEN), _BYTES_ALONE): "tekken",
}
_IGNORE_MERGES = ("llama-bpe", "tekken")  # a word that is a token is one, whatever the merges
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class Vocabulary:
    """A byte-level or sentencepiece BPE vocabulary; raises `Unsupported`."""

    def __init__(self, folder: Path) -> None:
        described = files.read_json(folder / "tokenizer.json")
        self._added, self._model = described["added_tokens"], described["model"]
        self.texts: dict[int, str] = {i: text for text, i in self._model["vocab"].items()}
        self.texts |= {token["id"]: token["content"] for token in self._added}
        self._cuts = _parts(described.get("pre_tokenizer"), "pretokenizers")
        normalizers = _parts(described.get("normalizer"), "normalizers")
        self._normalizer = [part["type"] for part in normalizers]
        if self._model["type"] != "BPE":
            raise Unsupported(f"its tokenizer is {self._model['type']}, and not BPE")
        for token in self._added:
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise Unsupported(f"its token {token['content']!r} takes white space with it")
        merges = (m.split(" ") if isinstance(m, str) else m for m in self._model["merges"])
        self._merges: list[tuple[str, str]] = [(left, right) for left, right in merges]
        self.is_sentencepiece = bool(self._model.get("byte_fallback"))
        if self.is_sentencepiece:
            self._scores, self.pre = self._sentencepiece_scores(), "default"
            self.adds_space = self._sentencepiece_prefix()
        else:
            self.pre, self.adds_space = self._byte_level_name(), False

    def _byte_level_name(self) -> str:
        if self._normalizer not in ([], ["NFC"]):  # Qwen's; llama.cpp leaves it out
            raise Unsupported(f"llama.cpp has no normalizer {', '.join(self._normalizer)}")
        name = _NAMES.get(tuple(map(_step, self._cuts)))
        ignores = bool(self._model.get("ignore_merges"))
        if name is None or ignores != (name in _IGNORE_MERGES):
            raise Unsupported("llama.cpp's name for the way its tokenizer cuts text is not known")
        return name

    def _sentencepiece_prefix(self) -> bool:
        """Whether a space is put before a text that follows a control token, too."""
        normalizer, cuts = self._normalizer, self._cuts
        if normalizer in (["Prepend", "Replace"], ["Replace"]) and not cuts:
            return normalizer[0] == "Prepend"
        if not normalizer and [cut["type"] for cut in cuts] == ["Metaspace"]:
            # "first" is before the very first token, where chat templates write a control token.
            return bool(cuts[0].get("prepend_scheme") == "always")
        raise Unsupported("its tokenizer treats spaces as no sentencepiece model of Llama's does")

    def _sentencepiece_scores(self) -> dict[str, float]:
        """Scores by token, higher ones first to be merged.

        llama.cpp merges any two neighbours whose text is a token, tokenizer.json only those that
        it lists: they agree where it lists all, token by token, as a conversion from sentencepiece
        does.
        """
        vocabulary = self._model["vocab"]
        if not vocabulary.keys() >= set(_BYTES):
            raise Unsupported("its tokenizer lacks tokens for single bytes")
        ranks: dict[str, list[int]] = {}
        for rank, (left, right) in enumerate(self._merges):
            ranks.setdefault(left + right, []).append(rank)
        listed = set(self._merges)
        special = {token["content"] for token in self._added}.union(_BYTES)
        for token in vocabulary.keys() - special:
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                mergeable = (len(part) == 1 or part in vocabulary for part in (left, right))
                if all(mergeable) and (left, right) not in listed:
                    raise Unsupported("its tokenizer's merges are not those of sentencepiece")
        if any(found[-1] - found[0] != len(found) - 1 for found in ranks.values()):
            raise Unsupported("its tokenizer's merges are not in the order of sentencepiece")
        return {token: -float(found[0]) for token, found in ranks.items()}

    def add(self, writer: gguf.GGUFWriter, size: int, special: dict[str, str]) -> None:
        """Add `size` tokens, the rows of the embedding; `special` has `bos`, `eos`, `eot`, …."""
        kinds = dict.fromkeys(_BYTES, TokenType.BYTE) if self.is_sentencepiece else {}
        for token in self._added:
            kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            kinds[token["content"]] = kind
        if self.is_sentencepiece:
            kinds[self._model.get("unk_token")] = TokenType.UNKNOWN
        texts = [self.texts.get(i, f"[PAD{i}]") for i in range(size)]
        kinds |= {text: TokenType.UNUSED for i, text in enumerate(texts) if i not in self.texts}
        writer.add_tokenizer_model("llama" if self.is_sentencepiece else "gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(texts)
        writer.add_token_types([kinds.get(text, TokenType.NORMAL) for text in texts])
        if self.is_sentencepiece:
            lowest = -float(len(self._merges) + 1)
            writer.add_token_scores([self._scores.get(text, lowest) for text in texts])
        else:
            writer.add_token_merges([" ".join(merge) for merge in self._merges])
        writer.add_add_space_prefix(self.adds_space)
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


def _step(step: dict[str, Any]) -> tuple[str, Any]:
    """Key of a pre-tokenizer's step."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return kind, step.get("use_regex", True)
    if kind == "Digits":
        return kind, step.get("individual_digits")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return kind, step["pattern"].get("Regex")
    return kind, None
