"""Floating-point operations of a token, forward and backward; a product and a sum are two.

P is a number of parameters, q the width of all query heads together, L layers, T the mean length of
a conversation in tokens.
"""

from dataclasses import dataclass

from stages.shared.tensors import Model
from stages.shared.tuning import Tuning


@dataclass(frozen=True)
class Operations:
    """Of one token, in a training step."""

    forward: float
    backward: float
    second_forward: float

    @property
    def total(self) -> float:
        """All three."""
        return self.forward + self.backward + self.second_forward


def of_token(
    model: Model, tuning: Tuning, supervised_share: float, mean_length: float
) -> Operations:
    """What a token costs.

    Backward through frozen weights costs what forward does, the gradient of the input alone; with
    the gradient of a trained matrix twice that. Checkpointing runs the blocks' forward again.

    Source: Kaplan et al. 2020, Scaling Laws for Neural Language Models, arXiv:2001.08361, section
    2.1, for the trained case.
    """
    blocks = 2.0 * block_parameters(model)
    head = 2.0 * model.vocabulary * model.hidden * supervised_share
    attention = attention_operations(model, mean_length)
    adapter = 2.0 * tuning.adapter.multiplied if tuning.adapter else 0.0
    forward = blocks + head + attention + adapter
    if tuning.adapter is None:
        backward = 2 * (blocks + head) + 2 * attention
    else:
        backward = blocks + head + 2 * (attention + adapter)
    again = blocks + attention + adapter if tuning.gradient_checkpointing else 0.0
    return Operations(forward, backward, again)


def block_parameters(model: Model) -> int:
    """P of the matrices a token goes through: of a mixture, of the experts that it is sent to."""
    linear = sum(t.size for t in model.tensors if t.kind == "linear")
    experts = [t for t in model.tensors if t.kind == "experts"]
    return linear + sum(t.size // t.shape[0] * model.active_experts for t in experts)


def attention_operations(model: Model, mean_length: float) -> float:
    """2·L·q·T: products with keys and with values, 2·q each, over the half that is not masked."""
    query = model.block.query if model.block else model.hidden
    return 2.0 * model.layers * query * mean_length
