"""Quantize the base model and measure its quantization error.

Reads:  models/base
Writes: models/quantized, reports/quantize.json, reports/details/quantize.json,
        reports/quantize.svg
Run:    python -m stages.quantize
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.quantize.config import Params, Quantize
from stages.shared.core import files, machine
from stages.shared.core.command import quick_imports, run
from stages.shared.core.params import load

if TYPE_CHECKING:
    import torch

BASE = Path("models/base")
QUANTIZED = Path("models/quantized")
REPORT = Path("reports/quantize.json")
DETAILS = Path("reports/details/quantize.json")
COMPARED = {"parameters", "bytes", "bits_per_parameter", "relative_error"}
CHART = Path("reports/quantize.svg")


def quantize(
    base: Path, target: Path, chart_file: Path, settings: Quantize, device: "torch.device"
) -> dict[str, Any]:
    """Write the model and the chart of its codebooks; returns metrics of the written files."""
    # Imported late: errors in params.yaml are reported before the seconds that torch takes.
    with quick_imports():
        from stages.shared.weights.checkpoint import Weights  # noqa: PLC0415

        # isort: split
        from stages.quantize import convert, quantization_error  # noqa: PLC0415

    with files.whole_folder(target) as folder:
        layout = convert.convert(base, folder, settings, device)
        written = Weights(folder)
        matrices = convert.linear_matrices(written.parameters, layout.embeddings)
        convert.require_expected_bits(matrices, settings)
        original = quantization_error.Base(Weights(base), layout, device)
        measured = quantization_error.measure(original, written, matrices, device)
        middle = matrices[len(matrices) // 2].name
        quantization_error.draw(chart_file, middle, original.matrix(middle), measured)
        return {
            "precision": settings.precision,
            "double_quant": settings.quantizes_twice,
            "parameters": sum(p.parameters for p in written.parameters),
            "linear_parameters": sum(m.parameters for m in matrices),
            "quantized_parameters": convert.quantized_parameters(matrices),
            "bytes": written.bytes,
            "bits_per_parameter": round(convert.bits_per_parameter(matrices), 4),
            "relative_error": measured.relative_error,
            "errors": measured.errors,
            "linear4_clip": measured.clip,
            "compared_parameters": measured.compared_parameters,
        }


def main() -> None:
    """Run the stage."""
    settings = load(Params, "quantize").quantize
    report = quantize(BASE, QUANTIZED, CHART, settings, machine.device())
    files.write_report(REPORT, DETAILS, report, COMPARED)


if __name__ == "__main__":
    run(main)
