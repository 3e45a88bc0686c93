"""LoRA adapters of a mixture's experts: attached to unfused ones, saved as peft reads fused ones.

In a file the experts have the names of the hub's files, as peft, vLLM and SGLang look for them;
with the library's own names Mixtral's are left out without a word. Where the hub's files hold
fused parameters, a layer's factors are put together as peft's `ParamWrapper` has them:

    A [experts · n · r, in],  B [out, n · r · experts],  n = 2 for gate and up, 1 for down
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from peft.utils import transformers_weight_conversion
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings

from stages.shared.weights import experts
from stages.shared.weights.experts import Experts

PREFIX = "base_model.model."  # of a tensor's name in an adapter's file


@contextmanager
def adapting(model: Any) -> Iterator[None]:
    """Context in which peft adapts unfused experts as the linear layers they are.

    By itself it would adapt the fused parameters that it expects of the architecture, and the
    router, and would leave out shared experts and dense layers, even where all are dense.
    """
    if model.config.get_text_config().model_type not in experts.FAMILIES:
        yield
        return
    with patch.multiple(
        transformers_weight_conversion,
        _convert_peft_config_moe=lambda *_: None,
        convert_peft_adapter_state_dict_for_transformers=lambda adapter_state_dict, **_: (
            adapter_state_dict
        ),
    ):
        yield


def saved_names(tuned: PeftModel, names: Iterable[str]) -> dict[str, str]:
    """Names in an adapter's file by the names of its tensors in the model."""
    base = tuned.get_base_model()
    if not experts.layers(base):
        return {name: name for name in names}
    conversions = reversed(get_model_conversion_mapping(base, add_legacy=False))
    renamings = [
        one.reverse_transform()
        for one in conversions
        if isinstance(one, WeightRenaming) and not isinstance(one, PrefixChange)
    ]
    short = {name: name.removeprefix(PREFIX) for name in names}
    return {name: PREFIX + apply_renamings(own, renamings) for name, own in short.items()}


def fuse(tuned: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put factors of experts together, in place, where the family's files hold fused ones."""
    for fused, prefix, layer, names in _fused_factors(tuned):
        if f"{prefix}.0.{names[0]}.lora_A.weight" in state:
            modules = [[f"{prefix}.{e}.{name}" for name in names] for e in range(len(layer))]
            a, b = (
                [[state.pop(f"{module}.lora_{ab}.weight") for module in one] for one in modules]
                for ab in "AB"
            )
            rows = torch.stack([torch.block_diag(*one) for one in b])  # [experts, out, n · r]
            if layer.family.interleaved:
                rows = rows.unflatten(1, (len(names), -1)).transpose(1, 2).flatten(1, 2)
            state[f"{fused}.lora_A.weight"] = torch.cat([torch.cat(one) for one in a])
            state[f"{fused}.lora_B.weight"] = rows.permute(1, 2, 0).flatten(1).contiguous()


def split(tuned: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Inverse of `fuse`."""
    for fused, prefix, layer, names in _fused_factors(tuned):
        if f"{fused}.lora_A.weight" in state:
            n, count = len(names), len(layer)
            a = state.pop(f"{fused}.lora_A.weight").unflatten(0, (count, n, -1))
            b = state.pop(f"{fused}.lora_B.weight").unflatten(1, (n, -1, count))
            for expert, (i, name) in product(range(count), enumerate(names)):
                rows = b[i::n] if layer.family.interleaved else b.chunk(n)[i]
                state[f"{prefix}.{expert}.{name}.lora_A.weight"] = a[expert, i]
                state[f"{prefix}.{expert}.{name}.lora_B.weight"] = rows[:, i, :, expert]


def _fused_factors(tuned: nn.Module) -> Iterator[tuple[str, str, Experts, Sequence[str]]]:
    """Names of fused factors and of the experts' list, the experts, and their matrices' names."""
    for prefix, layer in tuned.named_modules():
        if isinstance(layer, Experts) and layer.family.fused_files:
            yield f"{prefix}.base_layer", prefix, layer, layer.family.names[:2]
            yield prefix, prefix, layer, layer.family.names[2:]
