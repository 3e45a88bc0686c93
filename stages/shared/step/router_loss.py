"""Load-balancing loss of a mixture's routers.

    E · Σ_e f[e] · P[e]

f[e] is the share of a conversation's tokens that go to expert e (all k choices, all layers), P[e]
its mean probability. It is taken conversation by conversation and weighed like the conversation's
loss: that of a batch would depend on how conversations are packed and divided.

Source: Fedus et al. 2021, Switch Transformers, arXiv:2101.03961, equations 4 to 6; by sequence as
in DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from stages.shared.core.errors import UserError
from stages.shared.model.packing import Packed
from stages.shared.weights import experts


class RouterLoss:
    """Load-balancing loss of a step, added up over its micro-batches.

    Attributes:
        weight: of this loss, added to the cross-entropy.
        total: of the step, without the weight: fp64 [1].
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        """`model` is an unfused mixture, with or without an adapter."""
        config: Any = model.config
        self.weight, self._top_k = weight, config.get_text_config().num_experts_per_tok
        self.total = torch.zeros(1, dtype=torch.float64, device=next(model.parameters()).device)
        self._lengths: tuple[int, ...] = ()
        self._sums: list[torch.Tensor] | None = None
        for router in _routers(model):
            router.register_forward_hook(self._add)

    def watch(self, batch: Packed) -> None:
        """Follow the forward pass of a packed row, up to its `loss`."""
        self._lengths, self._sums = batch.lengths, []

    def _add(self, _: Any, _inputs: Any, output: Any) -> None:
        """Sum a layer's choices and probabilities: fp32 [conversations, 2, experts]."""
        if not self._lengths or not torch.is_grad_enabled():  # scoring
            return
        probabilities = output[0].softmax(-1, dtype=torch.float32)
        chosen = probabilities.detach().topk(self._top_k).indices
        hits = torch.zeros_like(probabilities, requires_grad=False).scatter_(1, chosen, 1.0)
        pairs = zip(*(x.split(self._lengths) for x in (hits, probabilities)), strict=True)
        sums = torch.stack([torch.stack([each.sum(0) for each in pair]) for pair in pairs])
        if self._sums is not None:  # a block that is computed again would keep its graph here
            self._sums.append(sums)

    def loss(self, batch: Packed, loss_weight: float) -> torch.Tensor:
        """Weighted part of the step's loss, fp32 []; adds to `total`."""
        layers = torch.stack(self._sums or [])
        self._sums = None
        hits, probabilities = layers.sum(0).unbind(1)  # [conversations, experts]
        lengths = torch.tensor(batch.lengths, device=layers.device)
        each = hits.shape[1] * (hits * probabilities).sum(1) / (lengths * len(layers)) ** 2
        conversation = torch.bucketize(batch.predictors, lengths.cumsum(0), right=True)
        own = torch.zeros(len(each), device=each.device).index_add_(0, conversation, batch.weights)
        loss = (each * own).sum() / loss_weight
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


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    """The router of each layer with experts."""
    for block in model.modules():
        named = dict(block.named_children())
        if any(isinstance(child, experts.Experts) for child in named.values()):
            yield named.get("gate") or named["router"]
