"""The machine's matrix rate now, and what a step's matrix products alone would take at it.

The rate is of bf16 products, or of fp32 on a CPU that has none of bf16 and computes in fp32.

A step's own products bound it from below, whatever else it does. They are counted here without
attention and adapters: a product of frozen weights a token forward and one for the gradient of its
input backward, and the same for the head where a token is supervised.
"""

import time
from functools import cache

import torch

from stages.plan import operations
from stages.shared.precision import computed_in
from stages.shared.tensors import Model

# Rows, inner, columns: the size of a small model's products; on a GPU, enough to fill it.
SHAPES = {"cpu": (2048, 1024, 1024), "cuda": (8192, 8192, 8192)}
PRODUCTS = 5


@cache
def _factors(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two matrices and room for their product, made once: they are no part of what is timed."""
    rows, inner, columns = SHAPES[device.type]
    shapes = (rows, inner), (inner, columns), (rows, columns)
    dtype = computed_in(torch.bfloat16, device.type)
    a, b, product = (torch.randn(s, device=device).to(dtype) for s in shapes)
    return a, b, product


def probe(device: torch.device) -> float:
    """Operations a second (a product and a sum are two) of a few matrix products."""
    a, b, product = _factors(device)
    torch.mm(a, b, out=product)
    wait(device)
    started = time.perf_counter()
    for _ in range(PRODUCTS):
        torch.mm(a, b, out=product)
    wait(device)
    return 2 * PRODUCTS * a.numel() * b.shape[1] / (time.perf_counter() - started)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given: a clock read earlier says nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bound_operations(model: Model, tokens: int, supervised_tokens: int) -> int:
    """4·P·tokens + 4·V·h·supervised: operations of a step's frozen matrix products.

    P counts the blocks' linear layers. The gradient of the first block's input, that nothing
    learns from, is counted too: less than 1 % of 135M parameters, nothing of 8B.

    Args:
        model: that is trained with an adapter.
        tokens: of the conversations, those that something learnt can see (`Example.input_tokens`).
        supervised_tokens: those that go through the head.
    """
    head = model.vocabulary * model.hidden * supervised_tokens
    return 4 * (operations.block_parameters(model) * tokens + head)
