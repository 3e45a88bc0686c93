"""Put the fused functions into a model, in the place of what its modules would compute.

The modules stay the library's own, with their weights and names: only what they do while gradients
are wanted is another function of the same values. Without gradients (in scoring, in generation)
they do what they always did, so that training's evaluations are what `evaluate` will measure.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from stages.shared import attention, precision
from stages.shared.packing import Packed
from stages.train.fused.linear import gated_lora_linear, lora_linear
from stages.train.fused.loss import token_losses
from stages.train.fused.norm import rms_norm


def fuse(model: nn.Module) -> None:
    """Change every norm, gated feed-forward and adapted linear layer of a model that is covered.

    Which models are is said by `stages.shared.tuning.Tuning.unfused_because`.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            _while_learning(module, _norm(module))
        elif isinstance(getattr(module, "down_proj", None), LoraLayer):
            _while_learning(module, _feed_forward(module))
        elif isinstance(module, LoraLayer):
            _while_learning(module, _linear(module))


def negative_log_likelihoods(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Per supervised token, in nats: fp32 [supervised]; as `scoring` computes them, in chunks."""
    causal = cast(PeftModel, model).get_base_model()
    hidden = causal.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=_no_mask(causal, batch),
        position_ids=batch.position_ids,
        use_cache=False,
        conversation_lengths=batch.lengths,
    ).last_hidden_state[0, batch.predictors]
    head = causal.get_output_embeddings().weight
    return token_losses(hidden.to(precision.of_products(hidden)), head, batch.targets)


def _no_mask(causal: Any, batch: Packed) -> torch.Tensor | None:
    """A mask for nobody, where attention goes by the lengths: transformers takes it as it is.

    The one that it would make for a packed row has a byte for each pair of tokens, a GiB at 32k.
    """
    config = causal.config
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and max(batch.lengths) > window
    if windowed or config._attn_implementation != attention.NAME:
        return None
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)


def _while_learning(module: nn.Module, fused: Callable[..., torch.Tensor]) -> None:
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        return (fused if torch.is_grad_enabled() else plain)(*args, **kwargs)

    module.forward = forward


def _norm(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: rms_norm(x, module.weight, module.variance_epsilon)  # type: ignore[arg-type]


def _linear(layer: LoraLayer) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: lora_linear(layer, x)


def _feed_forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: gated_lora_linear(module.down_proj, module.gate_proj(x), module.up_proj(x))
