"""Made-up outputs of every stage, as far as the report reads them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from stages.evaluate.__main__ import COMPARED
from stages.report.sources import VARIANTS
from stages.shared.core import files as core_files

ROOT = Path(__file__).parents[2]
SVG = '<?xml version="1.0"?>\n<svg width="9pt" viewBox="0 0 9 9"><g id="figure_1"/></svg>\n'
LOSS = {"base": 2.0, "quantized": 2.125, "adapter": 1.0, "merged": 1.0625}
EXACT_MATCH = {"base": 0.125, "quantized": 0.0625, "adapter": 0.75, "merged": 0.75}
STOP_RATE = {"base": 0.25, "quantized": 0.25, "adapter": 1.0, "merged": 1.0}


def metrics(variant: str) -> dict[str, Any]:
    return {
        "loss": LOSS[variant],
        "perplexity": math.exp(LOSS[variant]),
        "bits_per_byte": LOSS[variant] / 2,
        "tokens": 5120,
        "conversations": 165,
        "generated_rows": 64,
        "answered_rows": 40,
        "stop_rate": STOP_RATE[variant],
        "exact_match": EXACT_MATCH[variant],
    }


def answer(variant: str, text: str = "48 + 17 = 65.\n65") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "How many are 48 and 17?"}],
        "reference": "48 + 17 = 65.\n65",
        "expected": "65",
        "answer": text,
        "stopped": variant != "base",
        "correct": variant in ("adapter", "merged"),
        "language": "en",
    }


def contents() -> dict[str, Any]:
    """Relative path → JSON value or text."""
    names = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace")
    parts = {f"{name}_bytes": size for size, name in enumerate(names, start=1)}
    way = {**parts, "peak_bytes": 28, "fits": {"T4_16GiB": True}}
    split = {"conversations": 1500, "tokens": 95_000, "supervised_tokens": 31_000}
    files: dict[str, Any] = {
        "reports/prepare.json": {"rows_in": 1700, "rejected": 8, "train": split, "eval": split},
        "reports/quantize.json": {
            "precision": "nf4",
            "double_quant": True,
            "parameters": 134_515_008,
            "bytes": 112_000_000,
            "bits_per_parameter": 4.127,
            "relative_error": 0.095,
        },
        "reports/train.json": {
            "trainable_parameters": 4_884_480,
            "steps": 4,
            "best_step": 2,
            "loss": 0.9,
            "eval_loss": 1.0,
            "generalization_gap": 0.1,
            "stopped_early": True,
        },
        "reports/train/loss.csv": "step,epoch,learning_rate,loss,eval_loss,gradient_norm\n"
        "0,0.0,,,2.125,\n1,0.25,0.0002,2.0,,0.5\n2,0.5,0.0001,1.5,1.0,0.4\n",
        "reports/details/prepare.json": {"dropped_turns": 3, "train": {"languages": {"en": 900}}},
        "reports/details/quantize.json": {"errors": {"nf4": 0.095, "fp4": 0.13}},
        "reports/details/train.json": {
            "workers": 2,
            "environment": {"versions": {"torch": "2.13.0+cpu"}, "device": "AMD EPYC"},
        },
        "reports/details/merge.json": {"runtime_dtype": "bfloat16", "positions": 4096},
        "reports/merge.json": {
            "onto": "quantized",
            "kl_divergence": 1.2e-5,
            "top1_agreement": 0.9976,
            "runtime_top1_agreement": 0.98,
            "bytes": 269_060_552,
        },
        "reports/export.json": {
            "status": "exported",
            "gguf-q8_0": {
                "bytes": 144_811_586,
                "top1_agreement": 0.9975,
                "kl_divergence": 5.5e-4,
                "loss": 1.0628,
            },
        },
        "reports/details/export.json": {
            "merged_loss": 1.0625,
            "merged_tokens": 500,
            "gguf-q8_0": {
                "perplexity": 2.894,
                "bits_per_byte": 0.53,
                "tokens": 500,
                "conversations": 25,
            },
        },
        "reports/plan.json": {"note": "predicted", "techniques": {"qlora_nf4": way}},
        "reports/plan.svg": SVG,
        "reports/quantize.svg": SVG,
    }
    for variant in VARIANTS:
        by_language = {"en": metrics(variant), "other": metrics(variant)}
        by_role = {role: {"loss": 1.5, "tokens": 90} for role in ("assistant", "user")}
        divided: dict[str, Any] = {"by_language": by_language, "by_role": by_role}
        compared, rest = core_files.split(metrics(variant) | divided, COMPARED)
        files[f"reports/evaluate/{variant}.json"] = compared
        files[f"reports/details/evaluate/{variant}.json"] = rest
        files[f"reports/answers/{variant}.json"] = {
            "variant": variant,
            "answers": [answer(variant)],
        }
    return files


def write(root: Path, **changes: Any) -> Path:
    """Lay all files out below `root`; a changed JSON is named by its stem, or `parent_stem`.

    An evaluation that is changed has no details.
    """
    for name, usual in contents().items():
        path = root / name
        key = path.stem if path.parent.name == "reports" else f"{path.parent.name}_{path.stem}"
        content = changes.get(key, usual) if path.suffix == ".json" else usual
        content = {} if "details/evaluate" in name and key in changes else content
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    shutil.copy(ROOT / "params.yaml", root)
    return root
