"""Unfused experts of a mixture: one linear layer a matrix, under the names of the hub's files.

transformers 5 fuses the experts of a layer into 3-D parameters, which bitsandbytes leaves in 16
bits and peft adapts as a whole. Unfused, each matrix is quantized, adapted and merged by itself:

    y[t] = Σ_k p[t, k] · down(act(gate(x[t])) · up(x[t]))        over the k experts of token t

Source: Shazeer et al. 2017, Outrageously Large Neural Networks, arXiv:1701.06538, equation 1; Jiang
et al. 2024, Mixtral of Experts, arXiv:2401.04088, section 2.1.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
)
from transformers.integrations.moe import _default_apply_gate
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

Names = tuple[str, str, str]  # of gate, up and down in the files of the hub

GATED: Names = ("gate_proj", "up_proj", "down_proj")
NUMBERED: Names = ("w1", "w3", "w2")
# Architectures whose experts are gate_up_proj [experts, 2·width, hidden] and down_proj [experts,
# hidden, width], and whose files hold a tensor a matrix.
FAMILIES: dict[str, Names] = {
    **dict.fromkeys(
        "deepseek_v2 deepseek_v3 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite "  # noqa: SIM905
        "olmoe qwen2_moe qwen3_moe qwen3_next solar_open".split(),
        GATED,
    ),
    **dict.fromkeys(("lfm2_moe", "minimax", "minimax_m2", "mixtral"), NUMBERED),
}
EXPERT = re.compile(r"\.experts\.\d+\.")  # in the name of an expert's tensor or module


class Expert(nn.Module):
    """A gated MLP; its three linear layers have the names of the hub's files."""

    def __init__(self, matrices: tuple[torch.Tensor, ...], names: Names, act_fn: nn.Module) -> None:
        """`matrices`: gate and up [width, hidden], down [hidden, width]."""
        super().__init__()
        self.names, self.act_fn = names, act_fn
        for name, matrix in zip(names, matrices, strict=True):
            self.add_module(name, _linear(matrix))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output [tokens, hidden] of x [tokens, hidden]."""
        gate, up, down = (getattr(self, name) for name in self.names)
        output: torch.Tensor = down(self.act_fn(gate(x)) * up(x))
        return output


class Experts(nn.ModuleList):
    """Experts of a layer, of which those run that a token is routed to.

    Attributes:
        names: of gate, up and down.
        use: tokens by expert, counted since it was set: int64 [experts] on the host.
    """

    use: torch.Tensor | None = None

    def __init__(self, fused: Any, names: Names) -> None:
        """Copies the fused parameters."""
        gates, ups = fused.gate_up_proj.detach().chunk(2, dim=1)
        downs = fused.down_proj.detach()
        each = zip(gates, ups, downs, strict=True)
        super().__init__(Expert(matrices, names, fused.act_fn) for matrices in each)
        self.names = names

    def forward(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Outputs [tokens, hidden] of the experts `index` [tokens, k], summed by `weights`."""
        count = index.shape[-1]
        order = index.flatten().argsort(stable=True)
        tokens = tokens_by_expert(index, len(self))
        if self.use is not None:
            self.use += torch.tensor(tokens)
        rows = hidden[order // count].split(tokens)
        outputs = torch.cat([expert(x) for expert, x in zip(self, rows, strict=True) if len(x)])
        weighted = outputs * weights.flatten()[order, None]
        return weighted[order.argsort()].unflatten(0, index.shape).sum(1).to(hidden.dtype)


def tokens_by_expert(index: torch.Tensor, experts: int) -> list[int]:
    """Number of tokens that go to each expert."""
    tokens: list[int] = torch.bincount(index.flatten(), minlength=experts).tolist()
    return tokens


def unfuse(model: PreTrainedModel) -> None:
    """Replace fused experts by unfused ones, in place; nothing in a model outside of `FAMILIES`."""
    names = FAMILIES.get(model.config.get_text_config().model_type)
    fused = [name for name, module in model.named_modules() if names and _is_fused(module)]
    for name in fused:
        model.set_submodule(name, Experts(model.get_submodule(name), names or GATED))


def layers(model: nn.Module) -> list[Experts]:
    """The unfused experts of a model, layer by layer."""
    return [module for module in model.modules() if isinstance(module, Experts)]


@contextmanager
def unfused(config: PretrainedConfig) -> Iterator[None]:
    """Context in which transformers builds and loads the model of a config unfused."""
    if config.get_text_config().model_type not in FAMILIES:
        yield
        return
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    build, conversions = model_class.__init__, modeling_utils.get_model_conversion_mapping

    @wraps(build)
    def build_unfused(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        build(model, *args, **kwargs)
        unfuse(model)

    @wraps(conversions)
    def without_fusing(*args: Any, **kwargs: Any) -> list[WeightTransform]:
        return [one for one in conversions(*args, **kwargs) if not _fuses(one)]

    with (
        patch.object(model_class, "__init__", build_unfused),
        patch.object(modeling_utils, "get_model_conversion_mapping", without_fusing),
    ):
        yield


def hub_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Names in the hub's files by the names of modules or tensors of an unfused model."""
    conversions = reversed(get_model_conversion_mapping(model, add_legacy=False))
    renamings = [
        one.reverse_transform()
        for one in conversions
        if isinstance(one, WeightRenaming) and not isinstance(one, PrefixChange)
    ]
    return {name: apply_renamings(name, renamings) for name in names}


@contextmanager
def counted(model: nn.Module) -> Iterator[torch.Tensor]:
    """Tokens by expert in the context: int64 [layers, experts] on the host; empty if dense."""
    found = layers(model)
    use = torch.zeros(len(found), max(map(len, found), default=0), dtype=torch.int64)
    for row, experts in zip(use, found, strict=True):
        experts.use = row[: len(experts)]
    try:
        yield use
    finally:
        for experts in found:
            experts.use = None


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds gate, up and down as its family's fused parameters."""
    layout = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    plain = getattr(type(module), "_apply_gate", None) is _default_apply_gate
    return plain and all(getattr(module, key, None) is value for key, value in layout.items())


def _fuses(conversion: WeightTransform) -> bool:
    operations = conversion.operations if isinstance(conversion, WeightConverter) else ()
    return any(isinstance(operation, MergeModulelist) for operation in operations)


def _linear(weight: torch.Tensor) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.utils.skip_init(nn.Linear, columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone())  # a view could not be saved
    return layer
