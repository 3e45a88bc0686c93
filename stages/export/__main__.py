"""Write the tuned model for llama.cpp, Ollama and vLLM, and verify the files.

Reads:  models/merged, models/adapter, models/quantized, models/base/config.json,
        models/tokenizer, data/prepared/eval.parquet, data/prepared/format.json
Writes: models/exported/<format>, reports/export.json, reports/details/export.json
Run:    python -m stages.export
"""

from pathlib import Path
from typing import Any, get_args

from stages.export.config import VLLM_RANKS, Kind, Params
from stages.shared.core import files, params
from stages.shared.core.command import quick_imports, run

MERGED = Path("models/merged")
ADAPTER = Path("models/adapter")
QUANTIZED = Path("models/quantized")
PREPARED = Path("data/prepared")
EXPORTED = Path("models/exported")
METRICS = Path("reports/export.json")
DETAILS = Path("reports/details/export.json")
KEYS = ("bytes", "top1_agreement", "kl_divergence", "loss")
COMPARED = {"status", *(f"{name}.{key}" for name in get_args(Kind) for key in KEYS)}


def main() -> None:
    """Run the stage."""
    formats = params.load(Params, "export").export.formats
    metrics: dict[str, Any] = {"status": "not exported: export.formats is empty"}
    with files.whole_folder(EXPORTED) as partial:
        if formats:
            # Imported late: errors in params.yaml are reported before the seconds torch takes.
            with quick_imports():
                from stages.export.export import export  # noqa: PLC0415

            metrics = export(formats, MERGED, ADAPTER, QUANTIZED, PREPARED, partial)
    files.write_report(METRICS, DETAILS, metrics, COMPARED)
    print(metrics["status"])
    for name in formats:
        if name in metrics:
            print(serving(EXPORTED / name))


def serving(folder: Path) -> str:
    """The command that serves an exported format."""
    if folder.name != "vllm-lora":
        return f"ollama create tuned -f {folder}/Modelfile && ollama run tuned"
    config = files.read_json(folder / "adapter/adapter_config.json")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])  # as vLLM counts
    rank = min(known for known in VLLM_RANKS if known >= rank)
    options = f"--enable-lora --max-lora-rank {rank} --lora-modules tuned={folder}/adapter"
    return f"vllm serve {folder}/base {options}"


if __name__ == "__main__":
    run(main)
