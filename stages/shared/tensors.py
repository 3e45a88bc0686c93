"""A model as a list of tensors: names, kinds and shapes, and which of them an adapter trains."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from stages.shared.blocks import Block

Kind = Literal["embedding", "head", "linear", "experts", "norm", "bias", "other"]


@dataclass(frozen=True)
class Tensor:
    """One parameter tensor of a model.

    `shape` is (out, in) for a matrix of a linear layer, however the layer stores it. A `tied` one
    is stored under another name too, and counted there. What was made of several layers (experts
    that lie in one tensor, their router) has an adapter where their names are asked for: `parts`.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    quantizable: bool = False
    tied: bool = False
    parts: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def module(self) -> str:
        """The name of the layer that it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def container(self) -> str:
        """What the layers lay in that it was made of."""
        return self.module.rpartition(".")[0] if self.name.endswith(".weight") else self.module


@dataclass(frozen=True)
class Model:
    """A causal language model as far as its memory goes.

    Attributes:
        kind: the class of its blocks.
        tensors: all parameters.
        layers: number of blocks.
        hidden: h, width of the residual stream.
        vocabulary: V.
        block: widths of a block; None where blocks are not of the kind that `blocks` describes.
        window: tokens that attention looks back at most; None for all.
        active_experts: of a mixture, how many a token goes through.
    """

    kind: str
    tensors: Sequence[Tensor]
    layers: int
    hidden: int
    vocabulary: int
    block: Block | None
    window: int | None = None
    active_experts: int = 1


def parameter_count(tensors: Iterable[Tensor], kind: Kind | None = None) -> int:
    """P: parameters of one kind, or all of them; a tied tensor counts once."""
    return sum(t.size for t in tensors if not t.tied and kind in (None, t.kind))


def lora_targets(
    tensors: Iterable[Tensor],
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str] | None = None,
) -> list[Tensor]:
    """The matrices that get an adapter, matched as peft does.

    `all-linear` is every linear layer but the head; any other text is a pattern for a layer's
    whole name; a name in a list is a layer's whole name or its end, from a dot on. A layer that is
    trained in full (`modules_to_save`) gets none.

    Source: peft 0.21.2, peft/tuners/tuners_utils.py, `check_target_module_exists`.
    """
    tensors = list(tensors)
    saved = {t.name for t in saved_tensors(tensors, modules_to_save)}
    matrices = [t for t in tensors if t.kind in ("linear", "embedding", "head")]
    if mixture := [t for t in tensors if t.parts]:
        target_modules = _names_in_mixture(matrices, mixture, target_modules)
        parts = {name for t in mixture for name in t.parts}
        wanted = {name for name in target_modules if name.rpartition(".")[2] in parts}
        asked = {name.rpartition(".")[2] for name in wanted}
        # A layer that is called as a part is, a shared expert's, gets none for that.
        chosen = [t for t in matrices if _ends_in(t.module, set(target_modules) - wanted)]
        chosen += [t for t in mixture if asked.intersection(t.parts)]
    elif isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        chosen = [t for t in matrices if t.kind == "linear"]
    elif isinstance(target_modules, str):
        chosen = [t for t in matrices if re.fullmatch(target_modules, t.module)]
    else:
        chosen = [t for t in matrices if _ends_in(t.module, target_modules)]
    return [t for t in chosen if t.name not in saved]


def _ends_in(module: str, names: Iterable[str]) -> bool:
    return f".{module}".endswith(tuple(f".{name}" for name in names))


def _names_in_mixture(
    matrices: Sequence[Tensor], mixture: Sequence[Tensor], target_modules: str | Sequence[str]
) -> Sequence[str]:
    """The last parts of the names that a text stands for, those of the parts among them.

    Source: peft 0.21.2, peft/utils/transformers_weight_conversion.py, `_convert_peft_config_moe`.
    """
    if not isinstance(target_modules, str):
        return target_modules
    parts = {f"{t.container}.{name}" for t in mixture for name in t.parts}
    if target_modules.lower() == "all-linear":
        found = {t.module for t in matrices if t.kind == "linear"} | parts
    else:
        named = {t.module for t in matrices} | parts
        found = {name for name in named if re.fullmatch(target_modules, name)}
    return sorted({name.rpartition(".")[2] for name in found})


def saved_tensors(tensors: Iterable[Tensor], modules_to_save: Sequence[str] | None) -> list[Tensor]:
    """The tensors of which peft trains a full copy beside the adapter, by the name of a layer."""
    names = [f".{name}." for name in modules_to_save or ()]
    return [t for t in tensors if any(name in f".{t.module}." for name in names)]
