"""Architectures in GGUF: llama.cpp's names of tensors and hyperparameters, and their row order.

Source: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py; the package `gguf`.
"""

import re
from typing import Any

import gguf
import numpy as np

EXPERT = re.compile(r"\.experts\.(\d+)\.")  # here, as every stage may import this: torch takes long
# transformers' model_type → llama.cpp's architecture, and whether its rotary pairs are neighbours
_ARCHITECTURES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "mistral": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
    "mixtral": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen3_moe": (gguf.MODEL_ARCH.QWEN3MOE, False),
}
# Keys of each type of rotary embedding that llama.cpp computes the same
_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_ROPES: dict[str, set[str]] = {"default": set(), "linear": {"factor"}, "llama3": _LLAMA3}


class Unsupported(ValueError):  # noqa: N818  (about a model, not an error of the program)
    """A model or adapter that a format cannot hold; the message is the reason."""


class Architecture:
    """A model's config.json in the terms of llama.cpp; raises `Unsupported`."""

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
        self.rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        self.rope_type = self.rope.get("rope_type") or self.rope.get("type") or "default"
        if self.rope_type not in _ROPES:
            raise Unsupported(f"its rope_type is {self.rope_type}")
        known = {"rope_theta", "rope_type", "type", *_ROPES[self.rope_type]}
        known |= {"partial_rotary_factor"} if self.rope.get("partial_rotary_factor") == 1 else set()
        if extra := {key for key in self.rope.keys() - known if self.rope[key] is not None}:
            raise Unsupported(f"its rotary embedding has {', '.join(sorted(extra))}")
        self.theta = self.rope.get("rope_theta") or config.get("rope_theta") or 10000.0
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

        Its rotary embedding of Llama turns the pairs (2i, 2i + 1), transformers' (i, i + half).
        """
        if not self._permuted or not (".q_proj" in key or ".k_proj" in key):
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
