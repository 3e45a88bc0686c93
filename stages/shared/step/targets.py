"""Modules that get an adapter: names that match, a mixture's, trainable parameters by kind."""

import re
from collections import Counter
from inspect import signature
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils import transformers_weight_conversion as conversion
from torch import nn

from stages.shared.core import bounds
from stages.shared.core.errors import UserError
from stages.shared.model.loading import ADAPTER
from stages.shared.step.config import Lora
from stages.shared.weights import experts

KINDS = {  # by the name of a parameter; the first that matches
    "experts": experts.EXPERT,
    "router": re.compile(r"\.(gate|router|shared_expert_gate)\."),
    "shared_experts": re.compile(r"shared_expert|shared_mlp"),
    "attention": re.compile(r"attn|attention"),
    "mlp": re.compile(r"\.(mlp|feed_forward)\."),
}


def of_mixture(base: Any, lora: Lora) -> dict[str, Any]:
    """Arguments of `LoraConfig` that say which modules of an unfused mixture get an adapter.

    All linear layers are all but the head and the routers, a shared expert's among them. A
    router that `lora.target_modules` name is a parameter to peft, as it is no linear layer.
    """
    linear = {n for n, m in base.named_modules() if hasattr(m, "in_features")}
    own = experts.layers(base)[0].family.names
    chosen: Any = lora.target_modules
    parameters: list[str] = []
    if chosen == "all-linear":
        head = base.get_output_embeddings()
        heads = {n for n, m in base.named_modules() if m is head}
        chosen = sorted({n.rpartition(".")[2] for n in linear - heads if not _is_router(n)})
    elif lora.experts and isinstance(chosen, str):
        chosen = rf"(?:{chosen})|.*\.experts\.\d+\.(?:{'|'.join(own)})"
    elif lora.experts:
        most = max(map(len, experts.layers(base)))
        chosen = [*chosen, *(f"experts.{i}.{name}" for i in range(most) for name in own)]
    if isinstance(chosen, list):
        routers = {n.rpartition(".")[2] for n, m in base.named_modules() if _is_router(n)} - {
            n.rpartition(".")[2] for n in linear
        }
        parameters = [f"{name}.weight" for name in chosen if name in routers]
        chosen = [name for name in chosen if name not in routers]
    return {
        "target_modules": chosen,
        "target_parameters": parameters or None,
        "exclude_modules": rf".*{experts.EXPERT.pattern}.*" if lora.experts is False else None,
    }


def on_fused_experts(tuned: PeftModel) -> dict[str, Any]:
    """Keys of `adapter_config.json` that peft reads on the library's fused model; {} if dense.

    Experts are parameters there, gate and up one of twice the rank. Where peft knows as much of an
    architecture, it takes their names from `target_modules`, and dense layers of these names too.
    """
    base: Any = tuned.get_base_model()
    layers = experts.layers(base)
    if not layers:
        return {}
    config: Any = tuned.peft_config[ADAPTER]
    own = layers[0].family.names
    adapted = {n for n, m in base.named_modules() if isinstance(m, LoraLayer)}
    routed = {name.rpartition(".")[2] for name in adapted if experts.EXPERT.search(name)}
    parameters = {*(config.target_parameters or [])}
    parameters |= {f"experts.{'down' if name == own[2] else 'gate_up'}_proj" for name in routed}
    if conversion._MODEL_TO_CONVERSION_PATTERN.get(base.config.model_type) in (
        conversion._MOE_TARGET_MODULE_MAPPING
    ):
        dense = {name for name in adapted if name.endswith(own) and not experts.EXPERT.search(name)}
        parameters |= {f"{'.'.join(name.split('.')[-2:])}.weight" for name in dense}
    both = {r".*\.gate_up_proj": 2} if "experts.gate_up_proj" in parameters else {}
    return {
        "target_parameters": sorted(parameters),
        "rank_pattern": {name: n * config.r for name, n in both.items()},
        "alpha_pattern": {name: n * config.lora_alpha for name, n in both.items()},
    }


def _is_router(module: str) -> bool:
    return bool(KINDS["router"].search(f".{module}.")) and not experts.EXPERT.search(f"{module}.")


def trainable_by_kind(model: nn.Module) -> dict[str, int]:
    """Trainable parameters of each kind that a mixture has; 0 where a kind is left frozen."""
    counts: Counter[str] = Counter()
    for name, p in model.named_parameters():
        kind = next((k for k, pattern in KINDS.items() if pattern.search(name)), "other")
        if kind != "other" or p.requires_grad:
            counts[kind] += p.numel() * p.requires_grad
    return dict(counts)


def left_out(model: nn.Module) -> str | None:
    """A line on the kinds of a mixture's parameters that stay frozen; None if none does."""
    if not experts.layers(model):
        return None
    frozen = [kind for kind, trained in trainable_by_kind(model).items() if not trained]
    return f"lora: no adapter on {', '.join(frozen)}" if frozen else None


def require_terminating_pattern(base: nn.Module, lora: Lora) -> None:
    """Refuse a pattern whose matching does not end, by a UserError: `(.*)*x` is exponential."""
    if not isinstance(lora.target_modules, str):
        return
    try:
        with bounds.limited():
            for name, _ in base.named_modules():
                re.fullmatch(lora.target_modules, name)
    except bounds.Exceeded as exceeded:
        raise UserError(
            f"lora.target_modules: {lora.target_modules!r:.80} {exceeded} to match the names of "
            "this model's modules. Write a simpler pattern, or a list of names."
        ) from None


def require_modules(model: PeftModel, lora: Lora) -> None:
    """Raise a UserError for names without a module, where peft only wants one to have one."""
    copies = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    named = lora.target_modules if isinstance(lora.target_modules, list) else []
    tuner = model.base_model
    routers = [name.removesuffix(".weight") for name in tuner.targeted_parameter_names]
    for key, ends, modules in (
        ("target_modules", named, [*tuner.targeted_module_names, *routers]),
        ("modules_to_save", lora.modules_to_save or [], copies),
    ):
        for end in ends:
            if any(f".{name}".endswith(f".{end}") for name in modules):
                continue
            if key == "target_modules" and any(name.endswith(f".{end}") for name in copies):
                raise UserError(
                    f"lora.target_modules: {end!r} is in lora.modules_to_save too. Choose an "
                    "adapter or a full copy."
                )
            raise UserError(
                f"lora.{key}: this model has no module {end!r}. Name modules that it has, such "
                "as q_proj, lm_head or embed_tokens."
            )
    for name, layer in model.named_modules():
        table = layer.get_base_layer() if isinstance(layer, LoraLayer) else None
        # peft calls an embedding with token ids alone; OPT's positions are called with a mask.
        if isinstance(table, nn.Embedding) and len(signature(table.forward).parameters) > 1:
            raise UserError(
                f"lora.target_modules: {name} is a {type(table).__name__}, which peft cannot "
                "adapt. Take it out of them."
            )
    biases = [n for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad]
    if lora.bias != "none" and not biases:
        where = "this model" if lora.bias == "all" else "the layers of lora.target_modules"
        raise UserError(f"lora.bias: there is no bias in {where}. Set it to none.")
