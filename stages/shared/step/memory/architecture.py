"""Architecture of a causal language model: parameters by kind, and which blocks repeat."""

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from stages.shared.core import bounds
from stages.shared.core.errors import UserError
from stages.shared.model.loading import blocks_of
from stages.shared.step.memory.fake_model import model_on_meta, quantizable
from stages.shared.weights import experts

KINDS = ("embedding", "head", "linear", "experts", "norm", "bias", "other")
# Bounds of sizes in a config; beyond them, no model could be built within minutes.
SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")
LARGEST = dict.fromkeys(SIZES, 10**8) | {"num_hidden_layers": 1000}


@dataclass(frozen=True)
class Pattern:
    """The first blocks of a model, which stand for all."""

    layers: int  # blocks of the model
    run: int  # of them, the first ones
    start: int  # the first block of the period that repeats
    period: int  # its blocks

    @property
    def repeats(self) -> int:
        """Times that the model has the period more than once."""
        return (self.layers - self.run) // self.period

    @property
    def repeated(self) -> range:
        """The blocks of the period."""
        return range(self.start, self.start + self.period)


def all_blocks(layers: int) -> Pattern:
    """The pattern of a model whose blocks are all run."""
    return Pattern(layers, layers, 0, 1)


def read_config(path: Path) -> PretrainedConfig:
    """Read the config of a causal language model; UserError where transformers knows none."""
    if not path.is_file():
        raise UserError(f"{path}: not found. Run `dvc repro fetch_model`, or name another model.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        text = config.get_text_config()
        for name, largest in LARGEST.items():
            size = getattr(text, name, None)
            if isinstance(size, int) and not 0 < size <= largest:
                raise ValueError(f"{name} is {size}")
        bounds.require_consistent(config)
        rope = getattr(text, "rope_parameters", None) or {}
        if rope.get("rope_type") == "dynamic":  # reads positions; its tensors are the default's
            text.rope_parameters = {**rope, "rope_type": "default"}
        model_on_meta(config, torch.float32)
    except Exception as error:  # of any type, for values of odd types
        reason = " ".join(str(error).split())
        if " " not in reason:  # of a key alone
            reason = f"{type(error).__name__} {reason}"
        raise UserError(
            f"{path}: {reason:.150}. Correct it, or choose a causal language model that "
            "transformers knows."
        ) from None
    return config


def first_blocks(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with fewer blocks."""
    config = deepcopy(config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


def pattern_of(config: PretrainedConfig) -> Pattern:
    """The shortest pattern: three blocks are run, or more where kinds of them alternate."""
    kinds = _kinds(config)
    layers = len(kinds)
    shortest = all_blocks(layers)
    for period in range(1, layers // 2 + 1):
        same = [i for i in range(layers - period) if kinds[i] != kinds[i + period]]
        start = max(1, same[-1] + 1 if same else 0)  # below the first block nothing has a gradient
        run = start + period + 1
        run += (layers - run) % period
        if run < shortest.run:
            shortest = Pattern(layers, run, run - 1 - period, period)
    alike = _kinds(first_blocks(config, shortest.run)) == kinds[: shortest.run]
    return shortest if alike else all_blocks(layers)


def _kinds(config: PretrainedConfig) -> list[Any]:
    """Kinds of the blocks, by the shapes of their parameters and the config's lists."""
    model = model_on_meta(config, torch.float32)
    blocks = blocks_of(model)
    text = vars(model.config.get_text_config())
    lists = [v for v in text.values() if isinstance(v, list) and len(v) == len(blocks)]
    shapes = ([(name, tuple(p.shape)) for name, p in b.named_parameters()] for b in blocks)
    return [(own, [values[i] for values in lists]) for i, own in enumerate(shapes)]


def describe(config: PretrainedConfig) -> dict[str, Any]:
    """Parameters of a model by kind, and the widths that its operations are counted by."""
    model, text = model_on_meta(config, torch.float32), config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    chosen: int = getattr(text, "num_experts_per_tok", None) or 1
    kinds: Counter[str] = Counter()
    attention = idle = 0
    for name, p in model.named_parameters():  # a tied head is the embedding
        layer = model.get_submodule(name.rpartition(".")[0])
        kind = _kind(name, layer, p, head)
        kinds[kind] += p.numel()
        attention += p.numel() * (kind == "linear" and "attn" in name)
        idle += p.numel() // p.shape[0] * (p.shape[0] - chosen) * (kind == "experts")
    dense = sum(layer.weight.numel() for layer in quantizable(model).values())
    heads = getattr(text, "num_attention_heads", None) or 0  # Mamba has none
    head_size = getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)
    return {
        "parameters": {
            "parameters": kinds.total(),
            "active": kinds.total() - idle,
            **{kind: kinds[kind] for kind in KINDS},
            "attention": attention,
            "mlp": kinds["linear"] - attention,
            "quantizable": dense + kinds["experts"] * (text.model_type in experts.FAMILIES),
            "tied_head": head is not None and head.weight is embedding.weight,
        },
        "per_token": kinds["linear"] + kinds["experts"] - idle,
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "vocabulary": text.vocab_size,
        "query": heads * head_size,
    }


def _kind(name: str, layer: nn.Module, p: nn.Parameter, head: nn.Module | None) -> str:
    """Kind of a parameter, by the class of its layer."""
    class_name = type(layer).__name__.lower()
    if name.endswith("bias"):
        return "bias"
    if layer is head:
        return "head"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if type(layer) is nn.Linear or isinstance(layer, Conv1D):
        return "linear"
    if p.dim() == 3 and "expert" in class_name:
        return "experts"
    return "norm" if "norm" in class_name else "other"
