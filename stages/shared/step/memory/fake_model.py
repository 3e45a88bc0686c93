"""A model without values: on meta from its config alone, then on fake tensors of a CPU.

`Params4bit` and `Int8Params` of bitsandbytes refuse a fake tensor (`_make_subclass`). A fake
parameter takes their place whose class has their name, which peft asks for, and their attributes.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from stages.shared.core.bounds import require_possible_sizes
from stages.shared.core.errors import UserError
from stages.shared.model import attention, packing
from stages.shared.model.loading import blocks_of
from stages.shared.step.fused import cross_entropy, gpu, lora
from stages.shared.step.memory.setup import TrainingSetup
from stages.shared.weights import bnb, experts
from stages.shared.weights.bnb import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from stages.shared.weights.precision import DENSE_BYTES

KINDS = ("embedding", "head", "linear", "experts", "norm", "bias", "other")
CPU, META = torch.device("cpu"), torch.device("meta")
ATTRIBUTES_4BIT = ["blocksize", "compress_statistics", "quant_type", "quant_storage"]
ATTRIBUTES_4BIT += ["bnb_quantized", "module", "quant_state"]
FakeParams4bit = type("Params4bit", (FakeTensor,), {})
FakeInt8Params = type("Int8Params", (FakeTensor,), {})


@dataclass(frozen=True)
class Pattern:
    """The first blocks of a model, which stand for all: the last of them follows a period."""

    layers: int  # blocks of the model
    run: int  # of them, the first ones
    period: int = 1  # blocks that repeat together

    @property
    def repeated(self) -> range:
        """The blocks of the period."""
        return range(self.run - 1 - self.period, self.run - 1)

    @property
    def repeats(self) -> int:
        """Times that the model has the period more than once."""
        return (self.layers - self.run) // self.period


def read_config(path: Path) -> PretrainedConfig:
    """Read the config of a causal language model; UserError where transformers knows none."""
    if not path.is_file():
        raise UserError(f"{path}: not found. Run `dvc repro fetch_model`, or name another model.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        require_possible_sizes(config)
        text = config.get_text_config()
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


def model_on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config, with the attention that `loading.load_model` would give it."""

    def build(attn: str) -> PreTrainedModel:
        options: Any = {"attn_implementation": attn, "trust_remote_code": False}
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **options)

    with META:
        return attention.with_supported(build)


def quantizable(model: nn.Module) -> dict[str, Any]:
    """The layers that transformers has bitsandbytes quantize: no head, no fused experts."""
    dense = get_keys_to_not_convert(model)
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) in (nn.Linear, Conv1D) and should_convert_module(name, dense)
    }


def first_blocks(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with fewer blocks."""
    config = copy.deepcopy(config)
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
    shortest = Pattern(layers, layers)
    for period in range(1, layers // 2 + 1):
        unlike = [i for i in range(layers - period) if kinds[i] != kinds[i + period]]
        start = max(1, unlike[-1] + 1 if unlike else 0)  # below the first nothing has a gradient
        run = start + period + 1
        run += (layers - run) % period
        if run < shortest.run:
            shortest = Pattern(layers, run, period)
    same = _kinds(first_blocks(config, shortest.run)) == kinds[: shortest.run]
    return shortest if same else Pattern(layers, layers)


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


def quantize_on_meta(model: Any, precision: str, double_quant: bool, dtype: torch.dtype) -> None:
    """Replace quantizable layers by those of bitsandbytes; nothing in a dense precision."""
    model.is_loaded_in_4bit = precision in ("nf4", "fp4")  # what peft chooses its layers by
    model.is_loaded_in_8bit = precision == "int8"
    four_bit: Any = {"compute_dtype": dtype, "compress_statistics": double_quant}
    four_bit |= {"quant_type": precision, "device": META}
    for name, layer in quantizable(model).items() if precision not in DENSE_BYTES else ():
        weight = layer.weight.detach()  # [out, in]
        weight = weight.T if isinstance(layer, Conv1D) else weight
        if model.is_loaded_in_8bit:
            made: Any = Linear8bitLt(*weight.T.shape, False, has_fp16_weights=False, device=META)
        else:
            made = Linear4bit(*weight.T.shape, False, **four_bit)
            made.support_avx512bf16_for_cpu = False
        made.weight.data, made.bias = weight, layer.bias
        made.weight._quantize(META)
        model.set_submodule(name, made)


def to_fake(model: nn.Module) -> None:
    """Give all parameters and buffers fake tensors of a CPU; inside of a fake mode."""
    made: dict[int, nn.Parameter] = {}
    for layer in model.modules():
        for key, p in layer.named_parameters(recurse=False, remove_duplicate=False):
            if id(p) not in made:
                made[id(p)] = _fake_parameter(p)
            layer._parameters[key] = made[id(p)]
        for key, buffer in layer.named_buffers(recurse=False):
            layer._buffers[key] = _fake(buffer)


def _fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=CPU)


def _fake_parameter(p: nn.Parameter) -> nn.Parameter:
    made: Any = nn.Parameter(_fake(p), requires_grad=p.requires_grad)
    if isinstance(p, Params4bit):
        made.__class__ = FakeParams4bit
        for key in ATTRIBUTES_4BIT:
            setattr(made, key, getattr(p, key))
        for part, key, constant in _constants(p.quant_state):
            setattr(part, key, _fake(constant))
    if isinstance(p, Int8Params):
        made.__class__ = FakeInt8Params
        made.has_fp16_weights, made.CB = False, made.data
        made.SCB = torch.empty(len(p), device=CPU)
    return made


def _constants(state: Any) -> list[tuple[Any, str, torch.Tensor]]:
    """Tensors of a 4-bit weight's state and its nested one, each with its place."""
    parts = filter(None, (state, state.state2))
    named = [(part, key, value) for part in parts for key, value in vars(part).items()]
    return [place for place in named if torch.is_tensor(place[2])]


def state_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Constants of quantized layers that are neither parameters nor buffers."""
    tensors: list[torch.Tensor] = []
    for layer in model.modules():
        if isinstance(layer, Linear8bitLt):
            tensors.append(layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB)
        elif isinstance(layer, Linear4bit):
            state: Any = layer.weight.quant_state
            tensors += [constant for *_, constant in _constants(state)]
    return tensors


@contextmanager
def without_values(setup: TrainingSetup, dtype: torch.dtype) -> Iterator[None]:
    """Replace readers of values or addresses, and for CUDA the functions that differ on a CPU."""
    grouped_mm = torch._meta_registrations._meta_grouped_mm_common

    def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
        return torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device)

    def any_grouped_mm(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Kernels take other dtypes too; that of meta checks for bf16."""
        half = torch.bfloat16
        return grouped_mm(a.to(half), b.to(half), *args, **kwargs | {"out_dtype": None}).to(a.dtype)

    changes: list[tuple[Any, str, Any]] = [
        (torch._meta_registrations, "_meta_grouped_mm_common", any_grouped_mm),
        (packing, "to_device", to_device),
        (experts, "tokens_by_expert", _tokens_of_few_experts),
        (experts, "padded_size", lambda n: n + (n // 8 if setup.device == "cpu" else 0)),  # 9 %
        (lora, "dequantize_4bit_into", lambda _, state, buffer: buffer(state.shape, state.dtype)),
    ]
    if setup.device == "cuda":
        autocast = torch.is_autocast_enabled
        kernels = SimpleNamespace(  # in place, but for a dequantized matrix
            dequantize=lambda _, state, dtype: torch.empty(state.shape, dtype=dtype),
            swiglu_backward=lambda *_: None,
            cross_entropy=lambda *_: None,
        )
        changes += [
            (torch, "is_autocast_enabled", lambda *_: autocast("cpu")),
            (bnb.autograd, "MatMul8bitFp", bnb.autograd.MatMul8bitLt),
            (gpu, "on_gpu", lambda _: True),
            (gpu, "kernels", lambda: kernels),
            (gpu, "uses_liger", lambda _: False),
            (attention, "has_kernel", lambda *_: dtype != torch.float32),
            (attention, "to_device", to_device),
            (nn.functional, "dropout", _cuda_dropout),
        ]
    with ExitStack() as stack:
        for module, name, instead in changes:
            stack.enter_context(patch.object(module, name, instead))
        if setup.device == "cuda":
            sizes = cross_entropy.LOGITS_BYTES
            stack.enter_context(patch.dict(sizes, cpu=sizes["cuda"]))
        attention.cumulative_lengths.cache_clear()
        yield


def _tokens_of_few_experts(index: torch.Tensor, count: int) -> list[int]:
    """An upper bound, as routing depends on values: all tokens go to the same experts."""
    tokens, each = index.shape
    return [tokens] * each + [0] * (count - each)


def _cuda_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, *_: Any) -> torch.Tensor:
    """Dropout whose mask takes a byte an element, as CUDA's does; a CPU's is a factor."""
    return torch.native_dropout(x, p, True)[0] if training and p else x
