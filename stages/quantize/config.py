"""The section `quantize` of params.yaml."""

from typing import Literal

from stages.shared.core.params import Section

DENSE = ("fp32", "bf16", "fp16")
FOUR_BIT = ("fp4", "nf4")


class Quantize(Section):
    """The precision that the model is stored in.

    Attributes:
        precision: of every matrix that a linear layer multiplies with; embedding, head and norms
            stay dense.
        double_quant: whether the block constants of fp4 and nf4 are quantized too.
        compute_dtype: of int8, fp4 and nf4 layers, and of their model's dense parts; a dense
            precision computes in itself.
    """

    precision: Literal["fp32", "bf16", "fp16", "int8", "fp4", "nf4"]
    double_quant: bool
    compute_dtype: Literal["bf16", "fp16", "fp32"]

    @property
    def dense_dtype(self) -> str:
        """The dtype of everything that is not quantized."""
        return self.precision if self.precision in DENSE else self.compute_dtype

    @property
    def quantizes_twice(self) -> bool:
        """Whether block constants are quantized too: double quantization is of 4-bit types only."""
        return self.double_quant and self.precision in FOUR_BIT


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    quantize: Quantize
