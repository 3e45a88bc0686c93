"""Put the fused functions into a model: its modules keep their weights and names.

Where gradients are enabled, blocks and the last norm compute by the fused functions. Without
gradients (scoring, generation) they compute as transformers wrote them, so that evaluations during
training equal those of the stage `evaluate`.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from stages.shared.model import attention
from stages.shared.model.packing import Packed
from stages.shared.step.fused.block import decoder_block, expert_mlp
from stages.shared.step.fused.cross_entropy import linear_cross_entropy
from stages.shared.step.fused.rms_norm import rms_norm
from stages.shared.weights import experts, precision


def fuse(model: nn.Module) -> None:
    """Patch every block and the last norm of a model that `dry_run.unfused_because` allows."""
    decoder: Any = cast(PeftModel, model).get_base_model().get_decoder()
    _patch_forward(decoder.layers, decoder_block)
    for layer in experts.layers(decoder):
        _patch_forward(layer, expert_mlp)
    _patch_forward([decoder.norm], rms_norm)


def _patch_forward(modules: Iterable[nn.Module], fused: Callable[..., torch.Tensor]) -> None:
    """Give modules of one class a subclass: its forward is `fused` where gradients are enabled.

    transformers wraps gradient checkpointing around the forward of a block's subclass too.
    """
    cls: Any = type(next(iter(modules)))

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (fused if torch.is_grad_enabled() else cls.forward)(self, *args, **kwargs)

    subclass = type(cls.__name__, (cls,), {"forward": forward})
    for module in modules:
        module.__class__ = subclass


def negative_log_likelihoods(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Negative log-likelihoods as of `scoring`, fp32 [supervised], without whole logits."""
    causal: Any = cast(PeftModel, model).get_base_model()
    mask = None
    if not attention.needs_mask(causal.config, batch.lengths, causal.get_input_embeddings().weight):
        # A placeholder: without one, transformers makes a mask of all pairs of tokens.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    hidden = causal.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=batch.position_ids,
        use_cache=False,
        conversation_lengths=batch.lengths,
    ).last_hidden_state.squeeze(0)[batch.predictors]
    head = causal.get_output_embeddings().weight
    return linear_cross_entropy(hidden.to(precision.matmul_dtype(hidden)), head, batch.targets)
