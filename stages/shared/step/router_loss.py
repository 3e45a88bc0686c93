"""Load-balancing loss of a mixture's routers.

    E · Σ_e f[e] · P[e]

f[e] is the share of a conversation's tokens that go to expert e (all k choices, all layers), P[e]
its mean probability. It is taken conversation by conversation and weighed like the conversation's
loss: that of a batch would depend on how conversations are packed and divided.

Source: Fedus et al. 2021, Switch Transformers, arXiv:2101.03961, equations 4 to 6; by sequence as
in DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from stages.shared.core.errors import UserError
from stages.shared.model.packing import Packed
from stages.shared.weights import experts


class RouterLoss:
    """Load-balancing loss of a step, added up over its micro-batches.

    Attributes:
        weight: of this loss beside the cross-entropy.
        total: of the step, without the weight: fp64 [1].
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        """`model` is an unfused mixture, with or without an adapter."""
        self.weight, self._model = weight, model
        config: Any = model.config
        self._top_k: int = config.get_text_config().num_experts_per_tok
        self._logits: list[list[torch.Tensor]] = []
        self.total = torch.zeros(1, dtype=torch.float64, device=next(model.parameters()).device)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context of a micro-batch's forward pass, whose router logits are kept for `loss`."""
        routers = _routers(self._model)
        self._logits = [[] for _ in routers]
        hooks = [
            router.register_forward_hook(lambda _m, _i, output, to=to: to.append(output[0]))
            for router, to in zip(routers, self._logits, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, batch: Packed, loss_weight: float) -> torch.Tensor:
        """Weighted part of the step's loss, fp32 []; adds to `total`."""
        ends = torch.tensor(batch.lengths, device=batch.predictors.device).cumsum(0)
        found = torch.bucketize(batch.predictors, ends, right=True)
        own = found.bincount(batch.weights, minlength=len(ends))  # by number, or by weight
        layers = [torch.cat(logits).split(batch.lengths) for logits in self._logits]
        self._logits = []
        each = [
            load_balancing_loss_func(conversation, conversation[0].shape[-1], self._top_k)
            for conversation in zip(*layers, strict=True)
        ]
        loss = (torch.stack(each) * own).sum() / loss_weight
        self.total += loss.detach()
        return self.weight * loss


def weight_of(config: Any, requested: float | None) -> float:
    """Weight of the loss: requested, else the config's where it asks for the loss.

    Raises:
        UserError: a weight is requested for a model without such a loss.
    """
    text = config.get_text_config()
    own = getattr(text, "router_aux_loss_coef", None)
    if requested and (own is None or text.model_type not in experts.FAMILIES):
        raise UserError(
            "train.router_aux_loss: this model's config has no load-balancing loss. Set it to null."
        )
    if requested is None:
        return float(own or 0.0) if getattr(text, "output_router_logits", False) else 0.0
    return requested


def _routers(model: nn.Module) -> Sequence[nn.Module]:
    """The router beside each layer's experts."""
    found = []
    for block in model.modules():
        if any(isinstance(child, experts.Experts) for child in block.children()):
            named = dict(block.named_children())
            found.append(named.get("gate") or named["router"])
    return found
