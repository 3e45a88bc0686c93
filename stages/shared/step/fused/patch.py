"""Put the fused functions into a model, in the place of what its modules would compute.

The modules stay the library's own, with their weights and names: only what they do while gradients
are wanted is another function of the same values. Without gradients (in scoring, in generation)
they do what they always did, so that training's evaluations are what `evaluate` will measure.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stages.shared import attention, packing, precision
from stages.shared.packing import Packed
from stages.shared.row_sharing import shares_a_row
from stages.shared.step.fused.cross_entropy import token_losses
from stages.shared.step.fused.lora import dequantize_constants
from stages.shared.step.fused.mlp import feed_forward
from stages.shared.step.fused.qkv import onto, projected, turned
from stages.shared.step.fused.rms_norm import rms_norm


def fuse(model: nn.Module) -> None:
    """Change every block and the last norm of a model that is covered.

    Which models are is said by `stages.shared.tuning.Tuning.unfused_because`.
    """
    decoder: Any = cast(PeftModel, model).get_base_model().get_decoder()
    dequantize_constants(decoder)
    for block in decoder.layers:
        _while_learning(block, _checkpointed(block, _block(block)))
    _while_learning(decoder.norm, lambda x: rms_norm(decoder.norm, x))


def negative_log_likelihoods(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Per supervised token, in nats: fp32 [supervised]; as `scoring` computes them, in chunks."""
    if shares_a_row(model.config):
        return _of_row(model, batch)
    return torch.cat([_of_row(model, one) for one in packing.apart(batch)])


def _of_row(model: nn.Module, batch: Packed) -> torch.Tensor:
    causal = cast(PeftModel, model).get_base_model()
    hidden = causal.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=_no_mask(causal, batch),
        position_ids=batch.position_ids,
        use_cache=False,
        conversation_lengths=batch.lengths,
    ).last_hidden_state.squeeze(0)[batch.predictors]
    head = causal.get_output_embeddings().weight
    return token_losses(hidden.to(precision.of_products(hidden)), head, batch.targets)


def _no_mask(causal: Any, batch: Packed) -> torch.Tensor | None:
    """A mask for nobody, where none is needed: transformers takes it as it is."""
    embedding = causal.get_input_embeddings().weight
    if attention.needs_mask(causal.config, batch.lengths, embedding):
        return None
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)


def _while_learning(module: nn.Module, fused: Callable[..., torch.Tensor]) -> None:
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        return (fused if torch.is_grad_enabled() else plain)(*args, **kwargs)

    module.forward = forward


def _checkpointed(block: Any, fused: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """As transformers wraps a block's class: what stands in its place must do so itself."""

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if block.gradient_checkpointing and block.training:
            return block._gradient_checkpointing_func(partial(fused, **kwargs), hidden_states)
        return fused(hidden_states, **kwargs)

    return forward


def _block(block: Any) -> Callable[..., torch.Tensor]:
    """What a block of a decoder returns for a packed row: [1, tokens, width]."""

    def forward(
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        x = hidden_states.squeeze(0)  # an index would copy the gradient, into zeros
        angles = tuple(part[0] for part in position_embeddings)
        heads = _heads(block, x, angles)
        seen = _attended(block.self_attn, heads, attention_mask, kwargs)
        x = onto(x, block.self_attn.o_proj, seen)
        return feed_forward(block.post_attention_layernorm, block.mlp, x)[None]

    return forward


def _heads(block: Any, x: torch.Tensor, angles: Any) -> list[torch.Tensor]:
    """Queries, keys and values of x [tokens, width]: [1, heads, tokens, head size] each."""
    module = block.self_attn
    layers = (module.q_proj, module.k_proj, module.v_proj)
    normed = hasattr(module, "q_norm")  # Qwen3: head by head, before they are turned
    found = projected(block.input_layernorm, layers, x, None if normed else angles)
    heads = [part.unflatten(1, (-1, module.head_dim)) for part in found]
    if normed:
        for i, norm in enumerate((module.q_norm, module.k_norm)):
            heads[i] = turned(rms_norm(norm, heads[i]).flatten(1), *angles).view_as(heads[i])
    return [part.transpose(0, 1)[None] for part in heads]


def _attended(
    module: Any, heads: list[torch.Tensor], mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> torch.Tensor:
    """What the library's attention function returns for them: [tokens, heads · head size]."""
    config = module.config
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    function = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    dropout = module.attention_dropout if module.training else 0.0
    found, _ = function(
        module,
        *heads,
        mask,
        dropout=dropout,
        scaling=module.scaling,
        sliding_window=window,
        **kwargs,
    )
    return found.squeeze(0).flatten(1)
