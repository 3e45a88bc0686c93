"""What is trained beside frozen weights: sizes of tensors, in elements."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.shared import memory
from stages.shared.core.errors import UserError
from stages.shared.tensors import Tensor, lora_targets, saved_tensors

ANCHORED = ("pissa", "olora")  # adapters that carry a frozen copy of where they started


@dataclass(frozen=True)
class Adapter:
    """The tensors that are trained, all in fp32.

    Attributes:
        matrices: A and B of each layer; their sizes go with the rank.
        magnitudes: with DoRA, of each layer's outputs.
        copies: of `modules_to_save`, whole layers that are trained beside the frozen ones.
        biases: the model's own, trained in place.
        rank: that is trained, of A and B.
        layers: last parts of the names of the layers that have an adapter, such as `q_proj`.
        anchored: whether the matrices carry along a frozen copy of where they started, as large.
        everywhere: whether every linear layer of every block has one.
        head: whether the head has one.
    """

    matrices: list[int]
    magnitudes: list[int]
    copies: list[int]
    biases: list[int]
    rank: int
    layers: frozenset[str]
    anchored: bool = False
    everywhere: bool = True
    head: bool = False

    @property
    def sizes(self) -> list[int]:
        """All tensors that are trained."""
        return self.matrices + self.magnitudes + self.copies + self.biases

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(self.sizes)

    @property
    def multiplied(self) -> int:
        """Elements of the matrices that activations are multiplied with."""
        return sum(self.matrices) * (2 if self.anchored else 1)

    @property
    def multiplied_rank(self) -> int:
        """What lies between these matrices, in elements a token."""
        return self.rank * (2 if self.anchored else 1)

    @property
    def held(self) -> int:
        """Elements that are kept beside the model's own weights."""
        return self.multiplied + sum(self.magnitudes) + sum(self.copies)

    def at_rank(self, rank: int) -> "Adapter":
        """The same with matrices of another rank."""
        return replace(self, rank=rank, matrices=[m // self.rank * rank for m in self.matrices])


def of_parameters(tensors: Sequence[Tensor], lora: Any) -> Adapter:
    """The adapter that the parameters ask for.

    Args:
        tensors: of the model.
        lora: the section `lora`, as whichever stage reads it.

    Raises:
        UserError: `lora.target_modules` match no layer.
    """
    if not lora_targets(tensors, lora.target_modules, lora.modules_to_save):
        names = sorted({t.module.rpartition(".")[2] for t in tensors if t.kind == "linear"})
        raise UserError(
            f"params.yaml: lora.target_modules is {lora.target_modules!r} and matches no layer of "
            f"the model; expected all-linear, or names or a pattern among {', '.join(names)}"
        )
    return adapter_of(
        tensors,
        rank=lora.r,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        bias=lora.bias,
        dora=lora.dora,
        init=lora.init,
    )


def adapter_of(
    tensors: Sequence[Tensor],
    *,
    rank: int,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] | None = None,
    bias: str = "none",
    dora: bool = False,
    init: str = "default",
) -> Adapter:
    """The adapter that the section `lora` describes.

    One that starts at a principal part of each matrix (pissa, olora) carries that start along
    frozen: it has twice the rank, and trains half of it.
    """
    targets = lora_targets(tensors, target_modules, modules_to_save)
    adapted = {t.module for t in targets}
    biases = [
        t.size
        for t in tensors
        if t.kind == "bias" and (bias == "all" or (bias == "lora_only" and t.module in adapted))
    ]
    return Adapter(
        matrices=[size for t in targets for size in memory.lora_sizes(t, rank)],
        magnitudes=[t.shape[0] for t in targets] if dora else [],
        copies=[t.size for t in saved_tensors(tensors, modules_to_save)],
        biases=biases,
        rank=rank,
        layers=frozenset(module.rpartition(".")[2] for module in adapted),
        anchored=init in ANCHORED,
        everywhere=adapted.issuperset(t.module for t in tensors if t.kind == "linear"),
        head=any(t.kind == "head" for t in targets),
    )
