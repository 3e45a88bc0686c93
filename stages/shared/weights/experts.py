"""Unfused experts of a mixture: one linear layer a matrix, under the names of the hub's files.

transformers 5 fuses the experts of a layer into 3-D parameters, which bitsandbytes leaves in 16
bits and peft adapts as a whole. Unfused, each matrix is quantized, adapted and merged by itself:

    y[t] = Σ_k p[t, k] · down(act(gate(x[t])) · up(x[t]))        over the k experts of token t

Source: Shazeer et al. 2017, Outrageously Large Neural Networks, arXiv:1701.06538, equation 1; Jiang
et al. 2024, Mixtral of Experts, arXiv:2401.04088, section 2.1.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel, modeling_utils
from transformers.core_model_loading import MergeModulelist, WeightTransform
from transformers.integrations.moe import _default_apply_gate
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stages.shared.weights import precision

Names = tuple[str, ...]
EXPERT = re.compile(r"\.experts\.\d+\.")  # in the name of an expert's tensor or module
# Fused parameters in files: experts' prefix, gate_up or down, bias, MXFP4's codes or scales.
_IN_FILES = re.compile(r"(.+\.experts)\.(gate_up|down)_proj(_bias)?(_blocks|_scales)?")
_GRANITE = re.compile(r"(.+\.block_sparse_moe)\.(input|output)_linear\.weight")
_GRANITE_KINDS = {"input": "gate_up", "output": "down"}


@dataclass(frozen=True)
class Family:
    """Layout of an architecture's fused experts, and their matrices' names in files.

    Attributes:
        names: of gate, up and down.
        fused_files: whether files hold the fused parameters too.
        transposed: gate_up_proj [experts, hidden, 2·width], not [experts, 2·width, hidden].
        interleaved: rows gate 0, up 0, gate 1, …, not all of gate first; with biases, and clamped.
    """

    names: Names = ("gate_proj", "up_proj", "down_proj")
    fused_files: bool = False
    transposed: bool = False
    interleaved: bool = False

    def matrices(self, kind: str) -> Names:
        """Names of the matrices that are fused in gate_up, or in down."""
        return self.names[2:] if kind == "down" else self.names[:2]

    def split(self, kind: str, fused: torch.Tensor) -> dict[str, torch.Tensor]:
        """An expert's matrices [out, in] or biases by name, from its part of gate_up or down."""
        rows, names = fused.T if self.transposed and fused.ndim > 1 else fused, self.matrices(kind)
        every = len(names)
        parts = [rows[i::every] for i in range(every)] if self.interleaved else rows.chunk(every)
        return dict(zip(names, parts, strict=True))

    def fuse(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Inverse of `split`."""
        rows = torch.stack(parts, 1).flatten(0, 1) if self.interleaved else torch.cat(parts)
        return rows.T.contiguous() if self.transposed and rows.ndim > 1 else rows


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        "deepseek_v2 deepseek_v3 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite "  # noqa: SIM905
        "olmoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next solar_open".split(),
        Family(),
    ),
    **dict.fromkeys(("lfm2_moe", "minimax", "minimax_m2", "mixtral"), Family(("w1", "w3", "w2"))),
    **dict.fromkeys(
        ("granitemoe", "granitemoehybrid", "granitemoeshared"), Family(fused_files=True)
    ),
    "gpt_oss": Family(fused_files=True, transposed=True, interleaved=True),
}


class Piece(NamedTuple):
    """A tensor of one expert within a fused one."""

    source: str
    expert: int
    shape: tuple[int, ...]
    split: Callable[[torch.Tensor], dict[str, torch.Tensor]]  # of the expert's part
    name: str  # in the result


def pieces(model_type: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Piece]:
    """Tensors of single experts by name, of those that files hold fused, from all `shapes`."""
    parts = dict[str, Piece]()
    if (family := FAMILIES.get(model_type)) is None:
        return parts
    for name, shape in shapes.items():
        if match := _IN_FILES.fullmatch(name):
            prefix, kind, bias, packed = match.groups()
        elif match := _GRANITE.fullmatch(name):
            prefix, kind, bias, packed = f"{match[1]}.experts", _GRANITE_KINDS[match[2]], None, None
        else:
            continue
        if packed == "_scales":
            continue
        # MXFP4 is [rows, blocks, 16 bytes of two codes].
        each = torch.empty([shape[2] * 32, shape[1]] if packed else shape[1:], device="meta")
        for part, example in family.split(kind, each).items():
            own, split = f"{part}.{'bias' if bias else 'weight'}", partial(family.split, kind)
            for expert in range(shape[0]):
                piece = Piece(name, expert, tuple(example.shape), split, part)
                parts[f"{prefix}.{expert}.{own}"] = piece
    return parts


class Expert(nn.Module):
    """A gated MLP; its three linear layers have the names of the hub's files."""

    def __init__(self, fused: Any, number: int, family: Family) -> None:
        """Copies one expert of a fused module."""
        super().__init__()
        self.names = family.names
        self.act_fn = getattr(fused, "act_fn", None)
        if family.interleaved:  # the library's function for gate and up, with what it reads
            sizes = SimpleNamespace(alpha=fused.alpha, limit=fused.limit)
            self.apply_gate = partial(type(fused)._apply_gate, sizes)
        for kind in ("gate_up", "down"):
            stored = {"weight": f"{kind}_proj", "bias": f"{kind}_proj_bias"}
            split = {
                name: family.split(kind, values.detach()[number])
                for name, attribute in stored.items()
                if (values := getattr(fused, attribute, None)) is not None
            }
            for matrix in family.matrices(kind):  # copies: views could not be saved
                state = {name: parts[matrix].clone() for name, parts in split.items()}
                rows, columns = state["weight"].shape
                layer = nn.Linear(columns, rows, bias="bias" in state, device="meta")
                layer.load_state_dict(state, assign=True)
                self.add_module(matrix, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output [tokens, hidden] of x [tokens, hidden]."""
        gate, up, down = (getattr(self, name) for name in self.names)
        if self.act_fn is None:
            hidden = self.apply_gate(torch.stack((gate(x), up(x)), -1).flatten(-2))
        else:
            hidden = self.act_fn(gate(x)) * up(x)
        output: torch.Tensor = down(hidden)
        return output


class Experts(nn.ModuleList):
    """Experts of a layer, of which those run that a token is routed to.

    Attributes:
        family: of the model.
        use: tokens by expert, counted since it was set: int64 [experts] on the host.
    """

    use: torch.Tensor | None = None

    def __init__(self, fused: Any, family: Family) -> None:
        """Copies a fused module."""
        super().__init__(Expert(fused, number, family) for number in range(fused.num_experts))
        self.family = family

    def forward(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Outputs [tokens, hidden] of the experts `index` [tokens, k], summed by `weights`."""
        order = index.flatten().argsort(stable=True)
        tokens = tokens_by_expert(index, len(self))
        if self.use is not None:
            self.use += torch.tensor(tokens)
        compiles = hidden.device.type == "cpu" and precision.matmul_dtype(hidden) != torch.float32
        sizes = [padded_size(n) if compiles else n for n in tokens]
        own = (order // index.shape[-1]).split(tokens)
        padded = [pad(x, (0, n - len(x))) for x, n in zip(own, sizes, strict=True)]
        rows = hidden[torch.cat(padded)].split(sizes)
        outputs = [hidden[:0]] * len(self)
        for number in sorted(range(len(self)), key=sizes.__getitem__):
            if n := tokens[number]:
                outputs[number] = self[number](rows[number])[:n]
        weighted = torch.cat([x for x in outputs if len(x)]) * weights.flatten()[order, None]
        return weighted[order.argsort()].unflatten(0, index.shape).sum(1).to(hidden.dtype)


def padded_size(tokens: int) -> int:
    """Rows that a CPU multiplies for an expert's tokens: one of four numbers an octave.

    oneDNN compiles a matmul anew for each number of rows, in 0.25 ms where a small one takes 0.03.
    """
    step = max(8, 1 << (tokens - 1).bit_length() >> 3)
    return -(-tokens // step) * step if tokens > 1 else tokens


def tokens_by_expert(index: torch.Tensor, experts: int) -> list[int]:
    """Number of tokens that go to each expert."""
    tokens: list[int] = torch.bincount(index.flatten(), minlength=experts).tolist()
    return tokens


def save(
    model: PreTrainedModel,
    folder: Path,
    gathered: Mapping[nn.Parameter, torch.Tensor] | None = None,
) -> None:
    """`save_pretrained` under the names of the hub's files: some families' experts fused again.

    `gathered`: values of parameters that are not in the model.
    """
    state = model.state_dict(keep_vars=True)
    state = {name: (gathered or {}).get(p, p.detach()) for name, p in state.items()}
    for prefix, layer in model.named_modules():
        if isinstance(layer, Experts) and layer.family.fused_files:
            vars(model).pop("_weight_conversions", None)  # of loading, which had nothing to fuse
            _fuse(state, prefix, layer)
    model.save_pretrained(folder, state_dict=state)


def _fuse(state: dict[str, torch.Tensor], prefix: str, layer: Experts) -> None:
    """Replace the tensors of a layer's experts by fused ones."""
    for kind, which in product(("gate_up", "down"), ("weight", "bias")):
        names = [f"{name}.{which}" for name in layer.family.matrices(kind)]
        if f"{prefix}.0.{names[0]}" in state:
            parts = [[state.pop(f"{prefix}.{i}.{n}") for n in names] for i in range(len(layer))]
            name = f"{prefix}.{kind}_proj{'_bias' if which == 'bias' else ''}"
            state[name] = torch.stack([*map(layer.family.fuse, parts)])


def layers(model: nn.Module) -> list[Experts]:
    """The unfused experts of a model, layer by layer."""
    return [module for module in model.modules() if isinstance(module, Experts)]


def model_class(config: PretrainedConfig) -> Any:
    """Class of a config's causal language model."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


@contextmanager
def unfused(config: PretrainedConfig) -> Iterator[None]:
    """Context in which transformers builds and loads the model of a config unfused.

    Nothing changes for a model outside of `FAMILIES`.
    """
    family = FAMILIES.get(config.get_text_config().model_type)
    if family is None:
        yield
        return
    causal = model_class(config)
    build, conversions = causal.__init__, modeling_utils.get_model_conversion_mapping

    @wraps(build)
    def build_unfused(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        build(model, *args, **kwargs)
        for name in [name for name, m in model.named_modules() if _is_fused(m, family)]:
            model.set_submodule(name, Experts(model.get_submodule(name), family))

    @wraps(conversions)
    def without_fusing(*args: Any, **kwargs: Any) -> list[WeightTransform]:
        every = [(one, getattr(one, "operations", ())) for one in conversions(*args, **kwargs)]
        return [one for one, ops in every if not any(isinstance(o, MergeModulelist) for o in ops)]

    with (
        patch.object(causal, "__init__", build_unfused),
        patch.object(modeling_utils, "get_model_conversion_mapping", without_fusing),
    ):
        yield


@contextmanager
def counted(model: nn.Module) -> Iterator[torch.Tensor]:
    """Tokens by expert in the context: int64 [layers, experts] on the host; empty if dense."""
    mixtures = layers(model)
    use = torch.zeros(len(mixtures), max(map(len, mixtures), default=0), dtype=torch.int64)
    for row, experts in zip(use, mixtures, strict=True):
        experts.use = row[: len(experts)]
    try:
        yield use
    finally:
        stop_counting(model)


def stop_counting(model: nn.Module) -> None:
    """Leave later tokens out of `counted`."""
    for experts in layers(model):
        experts.use = None


def _is_fused(module: nn.Module, family: Family) -> bool:
    """Whether a module holds gate, up and down as its family's fused parameters."""
    clamped = family.interleaved
    layout = {"is_concatenated": not clamped, "has_bias": clamped}
    layout |= {"has_gate": True, "is_transposed": family.transposed}
    gate = getattr(type(module), "_apply_gate", None)
    plain = hasattr(module, "limit") if clamped else gate is _default_apply_gate
    return plain and all(getattr(module, key, None) is value for key, value in layout.items())
