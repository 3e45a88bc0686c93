"""Put the fused functions into a model: its modules keep their weights and names.

Where gradients are enabled, blocks and the last norm compute by the fused functions. Without
gradients (scoring, generation) they compute as transformers wrote them, so that evaluations during
training equal those of the stage `evaluate`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stages.shared.model import attention, packing
from stages.shared.model.packing import Packed, may_pack
from stages.shared.step.fused.cross_entropy import linear_cross_entropy
from stages.shared.step.fused.lora import dequantize_absmax
from stages.shared.step.fused.mlp import expert_mlp, swiglu_mlp
from stages.shared.step.fused.qkv import apply_rope, o_proj, qkv
from stages.shared.step.fused.rms_norm import rms_norm
from stages.shared.weights import experts, precision


def fuse(model: nn.Module) -> None:
    """Patch every block and the last norm of a model that `dry_run.unfused_because` allows."""
    decoder: Any = cast(PeftModel, model).get_base_model().get_decoder()
    dequantize_absmax(decoder)
    for block in decoder.layers:
        _patch_forward(block, _checkpointed(block, partial(_block, block)))
        for layer in experts.layers(block):
            for expert in layer:
                _patch_forward(expert, partial(expert_mlp, expert))
    _patch_forward(decoder.norm, partial(rms_norm, decoder.norm))


def negative_log_likelihoods(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Per supervised token, in nats, fp32 [supervised]; `scoring`'s, without whole logits."""
    if may_pack(model.config):
        return _of_row(model, batch)
    return torch.cat([_of_row(model, one) for one in packing.unpack(batch)])


def _of_row(model: nn.Module, batch: Packed) -> torch.Tensor:
    causal = cast(PeftModel, model).get_base_model()
    hidden = causal.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=_attention_mask(causal, batch),
        position_ids=batch.position_ids,
        use_cache=False,
        conversation_lengths=batch.lengths,
    ).last_hidden_state.squeeze(0)[batch.predictors]
    head = causal.get_output_embeddings().weight
    return linear_cross_entropy(hidden.to(precision.matmul_dtype(hidden)), head, batch.targets)


def _attention_mask(causal: Any, batch: Packed) -> torch.Tensor | None:
    """A placeholder where attention reads no mask: without one, transformers makes a whole."""
    embedding = causal.get_input_embeddings().weight
    if attention.needs_mask(causal.config, batch.lengths, embedding):
        return None
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)


def _patch_forward(module: nn.Module, fused: Callable[..., torch.Tensor]) -> None:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        return (fused if torch.is_grad_enabled() else original)(*args, **kwargs)

    module.forward = forward


def _checkpointed(block: Any, fused: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Gradient checkpointing, which transformers wraps around a block's class."""

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if block.gradient_checkpointing and block.training:
            return block._gradient_checkpointing_func(partial(fused, **kwargs), hidden_states)
        return fused(hidden_states, **kwargs)

    return forward


def _block(
    block: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """A decoder block on a packed row [1, tokens, width]."""
    x = hidden_states.squeeze(0)  # an index would copy the gradient, into zeros
    rope = tuple(part[0] for part in position_embeddings)
    heads = _heads(block, x, rope)
    x = o_proj(x, block.self_attn.o_proj, _attend(block.self_attn, heads, attention_mask, kwargs))
    if hasattr(block.mlp, "experts"):
        normed = rms_norm(block.post_attention_layernorm, x)
        _, weights, index = block.mlp.gate(normed)
        return (x + block.mlp.experts(normed, index, weights))[None]
    return swiglu_mlp(block.post_attention_layernorm, block.mlp, x)[None]


def _heads(block: Any, x: torch.Tensor, rope: Any) -> list[torch.Tensor]:
    """Queries, keys and values of x [tokens, width]: [1, heads, tokens, head size] each."""
    module = block.self_attn
    layers = (module.q_proj, module.k_proj, module.v_proj)
    normed = hasattr(module, "q_norm")  # Qwen3: head by head, before RoPE
    projections = qkv(block.input_layernorm, layers, x, None if normed else rope)
    heads = [part.unflatten(1, (-1, module.head_dim)) for part in projections]
    if normed:
        for i, norm in enumerate((module.q_norm, module.k_norm)):
            heads[i] = apply_rope(rms_norm(norm, heads[i]).flatten(1), *rope).view_as(heads[i])
    return [part.transpose(0, 1)[None] for part in heads]


def _attend(
    module: Any, heads: list[torch.Tensor], mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> torch.Tensor:
    """The model's attention function: [tokens, heads · head size]."""
    config = module.config
    result, _ = ALL_ATTENTION_FUNCTIONS[config._attn_implementation](
        module,
        *heads,
        mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        sliding_window=getattr(module, "sliding_window", getattr(config, "sliding_window", None)),
        **kwargs,
    )
    return result.squeeze(0).flatten(1)
