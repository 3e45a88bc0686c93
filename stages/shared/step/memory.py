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
is counted: `stages.shared.step.dry_run`.
"""

from collections.abc import Iterable

from stages.shared.weights.precision import stored_bytes

CODEBOOK, NESTED_CODEBOOK = 16, 256 + 1  # fp32 values; with double quantization, its mean too
ADAM_8BIT_BLOCK = 256  # elements of an 8-bit state that share a constant
ADAM_8BIT_MINIMUM = 4096  # a tensor with fewer elements keeps its states in fp32
PAGED_MINIMUM = 100_000  # a tensor with fewer elements keeps its states on the device


def four_bit_bytes(parameters: int, double_quant: bool) -> int:
    """Codes, constants and codebooks of a matrix in fp4 or nf4 (`QuantState`)."""
    codebooks = CODEBOOK + NESTED_CODEBOOK * double_quant
    return stored_bytes([parameters], "nf4", double_quant) + 4 * codebooks


def optimizer_bytes(optimizer: str, sizes: Iterable[int]) -> int:
    """States of AdamW for trainable tensors with these numbers of elements.

    Two moments each. In fp32 whatever the parameter is in, paged or not; in 8 bits with two fp32
    constants a block of 256 (bitsandbytes 0.50.2, `Optimizer2State.init_state`).
    """
    return sum(
        2 * size + 8 * -(-size // ADAM_8BIT_BLOCK)
        if optimizer == "adamw_8bit" and size >= ADAM_8BIT_MINIMUM
        else 8 * size
        for size in sizes
    )


def pageable_bytes(optimizer: str, sizes: Iterable[int]) -> int:
    """States of a paged optimizer that may leave a full device (`get_state_buffer`)."""
    return optimizer_bytes(optimizer, [size for size in sizes if size >= PAGED_MINIMUM])
