"""The section `quantize` of params.yaml."""

from typing import Literal

from stages.shared.core.params import Section

DENSE = ("fp32", "bf16", "fp16")
FOUR_BIT = ("fp4", "nf4")


class Quantize(Section):
    """Precision of linear layers; embedding, head and norms stay dense."""

    precision: Literal["fp32", "bf16", "fp16", "int8", "fp4", "nf4"]
    double_quant: bool  # of the block constants of fp4 and nf4
    compute_dtype: Literal["bf16", "fp16", "fp32"]  # with int8, fp4 and nf4, and of dense weights

    @property
    def dense_dtype(self) -> str:
        """Dtype of everything that is not quantized."""
        return self.precision if self.precision in DENSE else self.compute_dtype

    @property
    def quantizes_twice(self) -> bool:
        """Whether block constants are quantized too."""
        return self.double_quant and self.precision in FOUR_BIT


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    quantize: Quantize
