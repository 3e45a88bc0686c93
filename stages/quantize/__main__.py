"""The base model in the chosen precision, once: quantized, measured, compared.

Reads:  models/base
Writes: models/quantized, reports/quantize.json, reports/quantize.svg
Run:    python -m stages.quantize
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.quantize.settings import Params, Quantize
from stages.shared.core import files, progress
from stages.shared.core.errors import run
from stages.shared.core.machine import device
from stages.shared.core.params import load

if TYPE_CHECKING:
    import torch

BASE = Path("models/base")
QUANTIZED = Path("models/quantized")
REPORT = Path("reports/quantize.json")
PICTURE = Path("reports/quantize.svg")


def quantize(
    base: Path, target: Path, picture: Path, settings: Quantize, on: "torch.device"
) -> dict[str, Any]:
    """Write the model and the picture of its levels.

    Args:
        base: the model's folder.
        target: becomes the folder of the model in the chosen precision, whole or not at all.
        picture: becomes an SVG.
        settings: the precision.
        on: the device to quantize on.

    Returns:
        The report. `bits_per_parameter` and `relative_error` are those of the files that were
        written, over all matrices that a linear layer or an expert multiplies with.

    Raises:
        UserError: the device, the weights or the disk do not allow it, or the files are not what
            the precision promises.
    """
    # Imported late: a mistake in params.yaml is told before the seconds that torch takes.
    with progress.quick_imports():
        import stages.shared.models  # noqa: F401, PLC0415  (before transformers is loud)
        from stages.quantize import chart, comparison, convert, promise  # noqa: PLC0415
        from stages.quantize.stored import Weights  # noqa: PLC0415

    with files.whole_folder(target) as folder:
        layout = convert.convert(base, folder, settings, on)
        written = Weights(folder)
        matrices = promise.linear_matrices(written.parameters, layout.looked_up)
        promise.require_promise(matrices, settings)
        original = comparison.Base(Weights(base), layout, on)
        compared = comparison.compare(original, written, matrices, on)
        middle = matrices[len(matrices) // 2].name
        chart.draw(picture, middle, original.matrix(middle), compared)
        return {
            "precision": settings.precision,
            "double_quant": settings.quantizes_twice,
            "parameters": sum(p.parameters for p in written.parameters),
            "linear_parameters": sum(m.parameters for m in matrices),
            "quantized_parameters": promise.quantized_parameters(matrices),
            "bytes": written.bytes,
            "bits_per_parameter": round(promise.bits_per_parameter(matrices), 4),
            "relative_error": compared.relative_error,
            "errors": compared.errors,
            "linear4_clip": compared.clip,
            "compared_parameters": compared.compared_parameters,
        }


def main() -> None:
    """Run the stage."""
    settings = load(Params, "quantize").quantize
    report = quantize(BASE, QUANTIZED, PICTURE, settings, device())
    files.write_json(REPORT, report)


if __name__ == "__main__":
    run(main)
