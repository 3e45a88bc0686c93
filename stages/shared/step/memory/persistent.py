"""Persistent memory by formula: weights, adapter, gradients, optimizer.

| what                 | bytes                              | source |
|----------------------|------------------------------------|--------|
| weights, fp32        | 4·P                                | |
| weights, bf16, fp16  | 2·P                                | |
| weights, int8        | P + 4·rows                         | Dettmers 2022, arXiv:2208.07339, 2.1 |
| weights, nf4, fp4    | P/2 + 4·⌈P/64⌉                     | Dettmers 2023, arXiv:2305.14314, 3 |
| double quantization  | P/2 + ⌈P/64⌉ + 4·⌈⌈P/64⌉/256⌉      | the same |
| LoRA, fp32           | 4·r·(in + out); DoRA 4·out more    | Hu 2021, arXiv:2106.09685, 4.1 |
| gradients            | 4 a trainable parameter            | |
| AdamW                | 8 a trainable parameter            | Loshchilov 2017, arXiv:1711.05101 |
| 8-bit AdamW          | 2·P + 8·⌈P/256⌉; 8·P below 4,096   | Dettmers 2021, arXiv:2110.02861 |

P is the number of elements of a tensor. What lives within a step (activations, logits, workspace)
is counted: `dry_run.py`.
"""

from collections.abc import Iterable
from typing import Any

import torch

from stages.shared.model import loading
from stages.shared.parallel import units
from stages.shared.step.memory.fake_model import Pattern
from stages.shared.step.memory.setup import TrainingSetup
from stages.shared.weights import precision
from stages.shared.weights.bnb import Params4bit

CODEBOOK, NESTED_CODEBOOK = 16, 256 + 1  # fp32 values; with double quantization, its mean too
PAGED_MINIMUM = 100_000  # a tensor with fewer elements keeps its states on the device


def four_bit_bytes(parameters: int, double_quant: bool) -> int:
    """Codes, constants and codebooks of a matrix in fp4 or nf4 (`QuantState`)."""
    codebooks = CODEBOOK + NESTED_CODEBOOK * double_quant
    return precision.stored_bytes([parameters], "nf4", double_quant) + 4 * codebooks


def optimizer_bytes(optimizer: str, sizes: Iterable[int]) -> int:
    """States of AdamW for trainable tensors with these numbers of elements.

    Two moments each. In fp32 whatever the parameter is in, paged or not; in 8 bits with two fp32
    constants a block of 256 (bitsandbytes 0.50.2, `Optimizer2State.init_state`).
    """
    return sum(
        2 * size + 8 * -(-size // units.BLOCK)
        if optimizer == "adamw_8bit" and size >= units.SMALLEST
        else 8 * size
        for size in sizes
    )


def pageable_bytes(optimizer: str, sizes: Iterable[int]) -> int:
    """States of a paged optimizer that may leave a full device (`get_state_buffer`)."""
    return optimizer_bytes(optimizer, [size for size in sizes if size >= PAGED_MINIMUM])


def persistent_bytes(setup: TrainingSetup, model: Any, pattern: Pattern) -> dict[str, int]:
    """Bytes by part that a training holds from step to step, and of them those that may be paged.

    `model`, from `dry_run.prepare`, has the blocks that `pattern` runs.
    """
    blocks = loading.blocks_of(model)
    repeated = [blocks[i] for i in pattern.repeated]
    tensors = (t for block in repeated for t in (*block.parameters(), *block.buffers()))
    times = dict.fromkeys(tensors, 1 + pattern.repeats)
    weights = adapter = gradients = count = 0
    sizes: list[int] = []
    for p in model.parameters():
        n, one = times.get(p, 1), p.nbytes
        if isinstance(p, Params4bit):
            one = four_bit_bytes(p.quant_state.shape.numel(), setup.double_quant)
        elif setup.precision == "int8" and p.dtype == torch.int8:
            one = precision.stored_bytes(p.shape, "int8", False)
        count += n
        if p.requires_grad and setup.lora:
            adapter += n * one
        else:
            weights += n * one
        if p.requires_grad:
            gradients += n * p.nbytes
            sizes += [p.numel()] * n
    frozen = (b for name, b in model.named_buffers() if name.endswith(".frozen"))
    adapter += sum(times.get(b, 1) * b.nbytes for b in frozen)
    return {
        "weights": weights,
        "adapter": adapter,
        "gradients": gradients,
        "optimizer": optimizer_bytes(setup.optimizer, sizes),
        "pageable": pageable_bytes(setup.optimizer, sizes),
        "trainable": sum(sizes),
        "tensors": count + 4 * len(sizes),
        **_divisible_bytes(setup, model, pattern),
    }


def _divisible_bytes(setup: TrainingSetup, model: Any, pattern: Pattern) -> dict[str, int]:
    """Bytes that processes may divide, by what is gathered at once; in full fine-tuning of all."""
    plain: Any = loading.without_adapter(model)
    full = setup.lora is None
    sizes = [units.unit_bytes(block, full) for block in loading.blocks_of(plain)]
    embedding = units.unit_bytes(plain.get_input_embeddings(), full)
    head = units.unit_bytes(plain.get_output_embeddings(), full)
    blocks = sum(sizes) + pattern.repeats * sum(sizes[i] for i in pattern.repeated)
    untied_head = 0 if units.is_tied(plain, full) else head
    gradients = blocks + embedding + untied_head if full else 0
    return {
        "blocks": blocks,
        "largest_block": max(sizes),
        "embedding": embedding,
        "head": head,
        "untied_head": untied_head,
        "divided_gradients": gradients,
        "divided_states": optimizer_bytes(setup.optimizer, [gradients // 4]),
        "largest_unit": max(*sizes, embedding, head),
        "largest_matrix": max(p.nbytes for p in plain.parameters()),
    }
