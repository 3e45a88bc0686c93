"""The ways to tune a model that are held against each other, and what each keeps in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from stages.shared import memory
from stages.shared.memory import DensePrecision, Persistent, Precision
from stages.shared.tensors import Tensor, lora_targets, saved_tensors

CARDS_GIB = {
    "T4_16GiB": 16,
    "RTX_3090_24GiB": 24,
    "RTX_4090_24GiB": 24,
    "A100_40GiB": 40,
    "A100_80GiB": 80,
    "H100_80GiB": 80,
}
GIB = 2**30


@dataclass(frozen=True)
class Adapter:
    """What is trained beside frozen weights: sizes of tensors, in elements.

    `matrices` are the adapter proper, fp32. `copies` (of `modules_to_save`) and `biases` (the
    model's own, trained in place) keep the precision that the model's dense parts have.
    """

    matrices: list[int]
    copies: list[int]
    biases: list[int]

    @property
    def sizes(self) -> list[int]:
        """All tensors that are trained."""
        return self.matrices + self.copies + self.biases

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(self.sizes)


def adapter_of(
    tensors: Sequence[Tensor],
    *,
    rank: int,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str] | None,
    bias: str,
    dora: bool,
) -> Adapter:
    """The adapter that the section `lora` describes."""
    targets = lora_targets(tensors, target_modules, modules_to_save)
    layers = {t.module for t in targets}
    matrices = [size for t in targets for size in memory.lora_sizes(t, rank, dora=dora)]
    copies = [t.size for t in saved_tensors(tensors, modules_to_save)]
    biases = [
        t.size
        for t in tensors
        if t.kind == "bias" and (bias == "all" or (bias == "lora_only" and t.module in layers))
    ]
    return Adapter(matrices, copies, biases)


def full(
    tensors: Sequence[Tensor], precision: DensePrecision, optimizer: str = "adamw"
) -> Persistent:
    """Every weight is trained, in its own precision, with fp32 moments.

    `fp32` serves mixed precision too. Fp32 masters under bf16 autocast keep 4 bytes of weights, 4
    of gradients and 8 of moments a parameter: the same 16 as the usual count of 2 + 2 + 4 + 8 with
    half-precision weights and gradients beside the masters (Rajbhandari et al. 2019, ZeRO,
    arXiv:1910.02054, section 3.1). The bf16 copies that autocast makes last one forward pass.
    """
    sizes = [t.size for t in tensors if not t.tied]
    return Persistent(
        weights_bytes=memory.weights_bytes(tensors, precision),
        adapter_bytes=0,
        gradients_bytes=memory.gradients_bytes(sum(sizes), precision),
        optimizer_bytes=memory.optimizer_bytes(optimizer, sizes),
    )


def lora(
    tensors: Sequence[Tensor],
    adapter: Adapter,
    precision: Precision,
    *,
    double_quant: bool = False,
    dense: DensePrecision = "bf16",
    optimizer: str = "adamw",
) -> Persistent:
    """Frozen weights in any precision, a trained adapter beside them."""
    rest = memory.dense_precision(precision, dense)
    in_fp32, in_rest = sum(adapter.matrices), sum(adapter.copies)
    return Persistent(
        weights_bytes=memory.weights_bytes(
            tensors, precision, double_quant=double_quant, dense=dense
        ),
        adapter_bytes=memory.dense_bytes(in_fp32, "fp32") + memory.dense_bytes(in_rest, rest),
        gradients_bytes=memory.gradients_bytes(in_fp32)
        + memory.gradients_bytes(in_rest + sum(adapter.biases), rest),
        optimizer_bytes=memory.optimizer_bytes(optimizer, adapter.sizes),
    )


def standard(tensors: Sequence[Tensor], adapter: Adapter) -> dict[str, Persistent]:
    """The named techniques, with AdamW, from the most memory to the least."""
    return {
        "full_fp32": full(tensors, "fp32"),
        "full_mixed": full(tensors, "fp32"),
        "full_bf16": full(tensors, "bf16"),
        "lora_bf16": lora(tensors, adapter, "bf16"),
        "lora_int8": lora(tensors, adapter, "int8"),
        "qlora_nf4": lora(tensors, adapter, "nf4"),
        "qlora_nf4_double": lora(tensors, adapter, "nf4", double_quant=True),
    }


def fits(technique: Persistent) -> dict[str, bool]:
    """Whether what is persistent is below each card's memory; a `false` is final, a `true` not."""
    return {card: technique.persistent_bytes <= gib * GIB for card, gib in CARDS_GIB.items()}
