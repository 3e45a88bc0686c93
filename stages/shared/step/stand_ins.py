"""Stand-ins of a dry run: for readers of values or addresses, and for CUDA's choices on a CPU."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from stages.shared.model import attention, packing
from stages.shared.model.packing import Example
from stages.shared.step.fake_model import CPU
from stages.shared.step.fused import cross_entropy, gpu, lora
from stages.shared.step.fused import patch as fused_patch
from stages.shared.step.setup import TrainingSetup
from stages.shared.weights import bnb, experts


@contextmanager
def without_values(
    setup: TrainingSetup, dtype: torch.dtype, examples: Sequence[Example]
) -> Iterator[None]:
    """Replace readers of values or addresses, and for CUDA the functions that differ on a CPU."""
    grouped_mm = torch._meta_registrations._meta_grouped_mm_common

    def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
        return torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device)

    def any_grouped_mm(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Kernels take other dtypes too; that of meta checks for bf16."""
        half = torch.bfloat16
        return grouped_mm(a.to(half), b.to(half), *args, **kwargs | {"out_dtype": None}).to(a.dtype)

    changes: list[tuple[Any, str, Any]] = [
        (torch._meta_registrations, "_meta_grouped_mm_common", any_grouped_mm),
        (packing, "unpack", lambda _: [packing.pack([one], CPU) for one in examples]),
        (packing, "to_device", to_device),
        (experts, "tokens_by_expert", _tokens_of_few_experts),
        (experts, "padded_size", lambda n: n + (n // 8 if setup.device == "cpu" else 0)),  # 9 %
        (lora, "dequantize_4bit_into", lambda _, state, buffer: buffer(state.shape, state.dtype)),
    ]
    if setup.device == "cuda":
        autocast = torch.is_autocast_enabled
        changes += [
            (torch, "is_autocast_enabled", lambda *_: autocast("cpu")),
            (bnb.autograd, "MatMul8bitFp", bnb.autograd.MatMul8bitLt),
            (gpu, "on_gpu", lambda _: True),
            (gpu, "kernels", lambda: SimpleNamespace(**_KERNELS)),
            (gpu, "uses_liger", lambda _: False),
            (attention, "has_kernel", lambda *_: dtype != torch.float32),
            (attention, "to_device", to_device),
            (fused_patch, "dequantize_absmax", lambda _: None),
            (nn.functional, "dropout", _cuda_dropout),
        ]
    with ExitStack() as stack:
        for module, name, instead in changes:
            stack.enter_context(patch.object(module, name, instead))
        if setup.device == "cuda":
            sizes = cross_entropy.LOGITS_BYTES
            stack.enter_context(patch.dict(sizes, cpu=sizes["cuda"]))
        attention.cumulative_lengths.cache_clear()
        yield


def _tokens_of_few_experts(index: torch.Tensor, count: int) -> list[int]:
    """An upper bound, as routing depends on values: all tokens go to the same experts."""
    tokens, each = index.shape
    return [tokens] * each + [0] * (count - each)


_KERNELS = {  # of a GPU: in place, but for a dequantized matrix
    "dequantize": lambda _, state, dtype: torch.empty(state.shape, dtype=dtype),
    "swiglu_backward": lambda *_: None,
    "cross_entropy": lambda *_: None,
}


def _cuda_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, *_: Any) -> torch.Tensor:
    """Dropout whose mask takes a byte an element, as CUDA's does; a CPU's is a factor."""
    return torch.native_dropout(x, p, True)[0] if training and p else x
