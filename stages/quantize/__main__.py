"""Quantize the base model and measure its quantization error.

Reads:  models/base
Writes: models/quantized, reports/quantize.json, reports/details/quantize.json,
        reports/quantize.svg
Run:    python -m stages.quantize
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages.shared.core import files, machine
from stages.shared.core.command import quick_imports, run
from stages.shared.core.params import Section, load

if TYPE_CHECKING:
    import torch

BASE = Path("models/base")
QUANTIZED = Path("models/quantized")
REPORT = Path("reports/quantize.json")
DETAILS = Path("reports/details/quantize.json")
COMPARED = {"parameters", "bytes", "bits_per_parameter", "relative_error"}
CHART = Path("reports/quantize.svg")


class Quantize(Section):
    """Precision of linear layers; embedding, head and norms stay dense."""

    precision: Literal["fp32", "bf16", "fp16", "int8", "fp4", "nf4"]
    double_quant: bool  # of the block constants of fp4 and nf4
    compute_dtype: Literal["bf16", "fp16", "fp32"]  # with int8, fp4 and nf4, and of dense weights

    @property
    def is_four_bit(self) -> bool:
        """Whether weights are stored in fp4 or nf4."""
        return self.precision in ("fp4", "nf4")

    @property
    def dense_dtype(self) -> str:
        """Dtype of everything that is not quantized."""
        quantized = self.is_four_bit or self.precision == "int8"
        return self.compute_dtype if quantized else self.precision


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    quantize: Quantize


def quantize(
    base: Path, target: Path, chart: Path, settings: Quantize, device: "torch.device"
) -> dict[str, Any]:
    """Write the model and the chart of its codebooks; returns metrics of the written files."""
    # Imported late: errors in params.yaml are reported before the seconds that torch takes.
    with quick_imports():
        from stages.shared.weights.checkpoint import Weights  # noqa: PLC0415

        # isort: split
        from stages.quantize import convert, quantization_error  # noqa: PLC0415

    with files.whole_folder(target) as folder:
        original = convert.convert(base, folder, settings, device)
        written = Weights(folder)
        matrices = convert.linear_matrices(written.parameters, original.embeddings)
        parameters = sum(m.parameters for m in matrices)
        convert.require_expected_bits(matrices, settings)
        errors = quantization_error.measure(original, written, matrices)
        middle = matrices[len(matrices) // 2].name
        quantization_error.draw(chart, middle, original.matrix(middle), errors)
        return {
            "precision": settings.precision,
            "double_quant": settings.double_quant and settings.is_four_bit,
            "parameters": sum(p.parameters for p in written.parameters),
            "linear_parameters": parameters,
            "quantized_parameters": sum(m.parameters for m in matrices if m.parts),
            "bytes": written.bytes,
            "bits_per_parameter": round(8 * sum(m.bytes for m in matrices) / parameters, 4),
            **errors,
        }


def main() -> None:
    """Run the stage."""
    settings = load(Params, "quantize").quantize
    report = quantize(BASE, QUANTIZED, CHART, settings, machine.device())
    files.write_report(REPORT, DETAILS, report, COMPARED)


if __name__ == "__main__":
    run(main)
