"""What a model is made of, from its config alone: nothing else is read, and nothing allocated."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from stages.shared.blocks import LINEAR, Block
from stages.shared.core.errors import UserError
from stages.shared.memory import DensePrecision, Precision
from stages.shared.tensors import Kind, Model, Tensor

DENSE: dict[torch.dtype, DensePrecision] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
# Blocks that `stages.shared.blocks` describes, and that were measured.
KNOWN_BLOCKS = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
)


def model_of_config(path: Path) -> Model:
    """The model that a `config.json` describes, built on torch's meta device.

    Raises:
        UserError: the file is missing, or describes no causal language model that is known.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: not found; expected the config of the base model; run `dvc repro fetch_model`"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path}: {reason}; expected the config of a causal language model that transformers "
            "knows; choose another base model"
        ) from None
    return model_of(model)


@dataclass(frozen=True)
class Stored:
    """What a model's weights are stored in, as `quantize` names it."""

    precision: Precision
    double_quant: bool
    compute: DensePrecision


def stored_as(path: Path) -> Stored:
    """Read from a `config.json` that `quantize` wrote what its weights are in."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    dense = DENSE[config.dtype or torch.float32]
    quantization = getattr(config, "quantization_config", None) or {}
    if quantization.get("load_in_8bit"):
        return Stored("int8", False, dense)
    if not quantization.get("load_in_4bit"):
        return Stored(dense, False, dense)
    double_quant = bool(quantization["bnb_4bit_use_double_quant"])
    return Stored(quantization["bnb_4bit_quant_type"], double_quant, dense)


def model_of(model: PreTrainedModel) -> Model:
    """The same of a model that is not quantized yet."""
    config = model.config.get_text_config()
    tensors = tensors_of(model)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    kinds = {type(block).__name__ for block in blocks}
    known = kinds.issubset(KNOWN_BLOCKS) and _is_silu(config)
    return Model(
        kind=" and ".join(sorted(kinds)),
        tensors=tensors,
        layers=len(blocks),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        block=_block(tensors, config.num_attention_heads) if known else None,
        window=getattr(config, "sliding_window", None),
        active_experts=getattr(config, "num_experts_per_tok", None) or 1,
    )


def _is_silu(config: PretrainedConfig) -> bool:
    """Whether the gate's activation is one kernel that keeps its input alone."""
    return getattr(config, "hidden_act", None) == "silu"


def _block(tensors: list[Tensor], heads: int) -> Block | None:
    """The widths of the first block; None if another block has others."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for tensor in tensors:
        shapes.setdefault(tensor.module.rpartition(".")[2], set()).add(tensor.shape)
    rows = {name: {s[0] for s in shapes[name] if len(s) == 2} for name in LINEAR}
    if any(len(widths) != 1 for widths in rows.values()):
        return None
    width = {name: widths.pop() for name, widths in rows.items()}
    return Block(
        hidden=width["down_proj"],
        query=width["q_proj"],
        key_value=width["k_proj"],
        inner=width["gate_proj"],
        heads=heads,
        head_norms="q_norm" in shapes,
    )


def tensors_of(model: PreTrainedModel) -> list[Tensor]:
    """The tensors of a model that is not quantized yet, in its own order.

    What bitsandbytes will quantize is asked of transformers, by the class of each layer: a config
    that says "4-bit" does not make it so. Experts that are fused into one 3-D tensor stay dense.
    """
    kept_dense = get_keys_to_not_convert(model)
    head = model.get_output_embeddings()
    seen: set[int] = set()
    tensors = []
    for name, layer, parameter in _parameters(model):
        kind = _kind(name, layer, parameter, head)
        shape = tuple(parameter.shape)
        tensors.append(
            Tensor(
                name=name,
                kind=kind,
                shape=shape[::-1] if isinstance(layer, Conv1D) else shape,
                quantizable=kind == "linear"
                and should_convert_module(name.removesuffix(".weight"), kept_dense),
                tied=id(parameter) in seen,
            )
        )
        seen.add(id(parameter))
    return _with_parts(tensors, model.config.model_type)


def _with_parts(tensors: list[Tensor], model_type: str) -> list[Tensor]:
    """Of a mixture: which layers each was made of, by the names that peft still takes."""
    if not any(t.kind == "experts" for t in tensors):
        return tensors
    from peft.utils import transformers_weight_conversion as known  # noqa: PLC0415  (a second)

    kind = known._MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    fused = known._MOE_TARGET_MODULE_MAPPING.get(kind, {})
    return [
        replace(t, parts=tuple(part for part, end in fused.items() if t.name.endswith(f".{end}")))
        for t in tensors
    ]


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for path, layer in model.named_modules():
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{path}.{name}" if path else name, layer, parameter


def _kind(name: str, layer: nn.Module, parameter: nn.Parameter, head: nn.Module | None) -> Kind:
    """What a tensor is for, by the class of its layer."""
    class_name = type(layer).__name__.lower()
    if name.endswith("bias"):
        return "bias"
    if layer is head:
        return "head"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if type(layer) is nn.Linear or isinstance(layer, Conv1D):
        return "linear"
    if parameter.dim() == 3 and "expert" in class_name:
        return "experts"
    return "norm" if "norm" in class_name else "other"
