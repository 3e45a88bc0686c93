"""The paged optimizers of bitsandbytes, which wait for the device once a step.

Its own wait after each parameter: 448 times for an adapter on an 8B, while the GPU has nothing to
do. Pages are moved in the order of the device's work all the same, and the host looks at states
only after the wait at the end.

Source: bitsandbytes 0.50.2, `Optimizer8bit.step`.
"""

from collections.abc import Callable
from typing import Any

import torch

from stages.shared import bnb


class WaitsOnce(bnb.Optimizer8bit):
    """An optimizer of bitsandbytes whose step hands over all its work before it waits."""

    initialized: bool

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, group_index, index)
                self.prefetch_state(parameter)
                self.update_step(group, parameter, group_index, index)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return loss


class PagedAdamW32bit(WaitsOnce, bnb.PagedAdamW32bit):
    """AdamW with states in fp32."""


class PagedAdamW8bit(WaitsOnce, bnb.PagedAdamW8bit):
    """AdamW with states in 8 bits."""
