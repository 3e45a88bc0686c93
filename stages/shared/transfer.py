"""Arrays of the host on a device, without waiting for the device."""

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of the array's shape and dtype; on a CPU it shares the array's memory.

    CUDA copies from pinned memory while the host goes on; from any other the host would wait until
    the device has done all that it was asked for before.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
