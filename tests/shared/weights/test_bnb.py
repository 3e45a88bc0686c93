"""bitsandbytes: imported without torch's compiler, by one module; and its guard."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.shared.model import loading
from stages.shared.weights import bnb
from tests import tiny

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
IDS = torch.arange(10, 42)[None]


@pytest.mark.parametrize("stage", ["train", "merge", "evaluate", "quantize"])
def test_stage_imports_no_compiler(stage: str) -> None:
    """In the order of its `main`."""
    tree = ast.parse((ROOT / "stages" / stage / "__main__.py").read_text())
    late = [
        ast.unparse(statement)
        for block in ast.walk(tree)
        if isinstance(block, ast.With)
        for statement in block.body
        if isinstance(statement, ast.Import | ast.ImportFrom)
    ]
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "\n".join(late)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(re.findall(r"\| +([\w.]+)$", result.stderr, re.MULTILINE))
    assert {"torch", "bitsandbytes.nn.modules"} <= imported
    assert ("peft" in imported) is (stage != "quantize")
    assert "torch._inductor.compile_fx" not in imported


def test_one_module_imports_bitsandbytes() -> None:
    importing = [
        path
        for path in (ROOT / "stages").rglob("*.py")
        if re.search(r"^\s*(?:from|import) bitsandbytes", path.read_text(), re.MULTILINE)
    ]
    assert importing == [ROOT / "stages/shared/weights/bnb.py"]


def gradient_norm(model: PreTrainedModel) -> float:
    """The norm of the embedding's gradient, which runs through every quantized layer."""
    model.train()
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return float(cast(torch.Tensor, model.get_input_embeddings().weight.grad).float().norm())


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits.clone()


def packed(model: PreTrainedModel) -> list[torch.Tensor]:
    return [layer.weight.data.clone() for layer in bnb.quantized_layers(model).values()]


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
@pytest.mark.parametrize("guarded", [True, False])
def test_guard_keeps_weights_through_evaluation(tmp_path: Path, guarded: bool) -> None:
    """The tiny model's sizes are multiples of 64, as the repacking wants them."""
    if not guarded and not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16: nothing is repacked")
    folder = tiny.quantize(tmp_path / "nf4", "nf4")
    model = (
        loading.load_model(folder, CPU)
        if guarded
        else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    )
    before, weights = gradient_norm(model), packed(model)
    first = logits(model)
    same = [torch.equal(a, b) for a, b in zip(packed(model), weights, strict=True)]
    assert len(same) == 14
    if guarded:
        assert all(same)
        assert gradient_norm(model) == before
        assert torch.equal(logits(model), first)
    else:
        assert not any(same)
        assert gradient_norm(model) != pytest.approx(before, rel=0.01)


def test_kernels_package_is_never_asked_for_code(tmp_path: Path) -> None:
    """Installed, it fetches code from the hub: bitsandbytes asks it at import on some CPUs."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("raise SystemExit('asked')")
    (tmp_path / "kernels-0.18.5.dist-info").mkdir()
    (tmp_path / "kernels-0.18.5.dist-info/METADATA").write_text("Name: kernels\nVersion: 0.18.5\n")
    script = """
import stages.shared.model.loading
from transformers.utils import is_kernels_available
assert not is_kernels_available()
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
