"""Write the tuned model for llama.cpp, Ollama and vLLM, and verify the files.

Reads:  models/merged, models/adapter, models/quantized, models/base/config.json,
        models/tokenizer, data/prepared/eval.parquet, data/prepared/format.json
Writes: models/exported/<format>, reports/export.json, reports/details/export.json
Run:    python -m stages.export
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationInfo, field_validator

from stages.shared.core import files, params
from stages.shared.core.command import quick_imports, run
from stages.shared.core.errors import UserError
from stages.shared.core.params import Section

BASE_CONFIG, TOKENIZER = Path("models/base/config.json"), Path("models/tokenizer")
MERGED = Path("models/merged")
ADAPTER, QUANTIZED = Path("models/adapter"), Path("models/quantized")
PREPARED = Path("data/prepared")
EXPORTED = Path("models/exported")
METRICS, DETAILS = Path("reports/export.json"), Path("reports/details/export.json")
Kind = Literal["gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q4_0", "gguf-lora", "vllm-lora"]
DEFAULT: list[Kind] = ["gguf-q8_0"]
KEYS = ("bytes", "top1_agreement", "kl_divergence", "loss")
COMPARED = {"status", *(f"{name}.{key}" for name in get_args(Kind) for key in KEYS)}
HINT = "llama.cpp's own convert_hf_to_gguf.py may read models/merged"


class Export(Section):
    """File formats."""

    formats: list[Kind]

    @field_validator("formats")
    @classmethod
    def _hold_the_model(cls, formats: list[Kind], info: ValidationInfo) -> list[Kind]:
        """Refuse formats that cannot hold the model, before it is trained.

        The default is not refused: its status says why nothing was exported.
        """
        if len({*formats}) < len(formats):
            raise ValueError("each format once")
        named = formats != DEFAULT and any(name.startswith("gguf") for name in formats)
        fetched = info.context not in (None, "fetch_data", "fetch_model") and BASE_CONFIG.exists()
        if named and fetched:
            from stages.export import llama_cpp  # noqa: PLC0415  (brings numpy)

            try:
                llama_cpp.Architecture(files.read_json(BASE_CONFIG))
                llama_cpp.Vocabulary(TOKENIZER)
            except llama_cpp.Unsupported as reason:
                raise _refusal(reason) from None
        return formats


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    export: Export


def main() -> None:
    """Run the stage."""
    formats = params.load(Params, "export").export.formats
    with files.whole_folder(EXPORTED) as partial:
        metrics = export(formats, partial)
    files.write_report(METRICS, DETAILS, metrics, COMPARED)
    print(metrics["status"])
    if metrics["status"] == "exported":
        from stages.export.export import serving  # noqa: PLC0415

        print(*(serving(EXPORTED / name) for name in formats), sep="\n")


def export(formats: Sequence[str], folder: Path) -> dict[str, Any]:
    """Write the formats into `folder`, and return the metrics.

    The default that cannot hold the model ends well, and its status says why; formats that the user
    names raise a UserError.
    """
    if not formats:
        return {"status": "not exported: export.formats is empty"}
    with quick_imports():  # late: errors in params.yaml are reported before torch's seconds
        from stages.export.export import Exporter  # noqa: PLC0415
        from stages.export.llama_cpp import Unsupported  # noqa: PLC0415
    try:
        metrics = Exporter(MERGED, ADAPTER, QUANTIZED, PREPARED).export(formats, folder)
    except Unsupported as reason:
        if formats != DEFAULT:
            raise _refusal(reason) from None
        for path in folder.iterdir():
            shutil.rmtree(path)
        return {"status": f"not exported: {reason}; {HINT}"}
    return {"status": "exported", **metrics}


def _refusal(reason: Exception) -> UserError:
    return UserError(f"params.yaml: export.formats: {reason}. Set [] here; {HINT}.")


if __name__ == "__main__":
    run(main)
