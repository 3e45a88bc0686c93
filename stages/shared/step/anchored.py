"""Factors of an adapter of which one half learns and the other is held still.

Only the half that learns is a parameter, so that the optimizer, its weight decay, clipping and
checkpoints know of no other; the layer multiplies with both, and both are saved.
"""

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization


class Anchored(nn.Module):
    """A parametrization of a weight: [trained; frozen] along a dimension."""

    frozen: torch.Tensor

    def __init__(self, frozen: torch.Tensor, dim: int) -> None:
        super().__init__()
        self.register_buffer("frozen", frozen)
        self.dim = dim

    def forward(self, trained: torch.Tensor) -> torch.Tensor:
        """The whole weight."""
        return torch.cat([trained, self.frozen], self.dim)

    def right_inverse(self, whole: torch.Tensor) -> torch.Tensor:
        """The half that is trained."""
        return whole.chunk(2, self.dim)[0].clone()


def anchor(layer: nn.Linear, start: torch.Tensor, frozen: torch.Tensor, dim: int) -> None:
    """Make a layer's weight [start; frozen] along `dim`, of which only the first half is trained.

    Args:
        layer: its weight has twice the size of `start` along `dim`.
        start: fp32, where the trained half begins.
        frozen: as `start`.
        dim: 0 or 1.
    """
    with torch.no_grad():
        layer.weight.copy_(torch.cat([start, frozen], dim))
    register_parametrization(layer, "weight", Anchored(frozen.clone(), dim))


def ordinary_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The model's state with every weight whole, as if its adapter were an ordinary one."""
    state = {k: v for k, v in model.state_dict().items() if ".parametrizations." not in k}
    for name, layer in model.named_modules():
        if is_parametrized(layer, "weight"):
            state[f"{name}.weight"] = layer.weight.detach()
    return state
