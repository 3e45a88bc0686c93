"""How bitsandbytes is imported: without torch's compiler, and by one module alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.shared.weights import bnb

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", ["train", "merge", "evaluate", "quantize"])
def test_no_stage_imports_the_compiler(stage: str) -> None:
    """Of what a stage imports when its parameters are read, in its order."""
    tree = ast.parse((ROOT / "stages" / stage / "__main__.py").read_text())
    late = [
        ast.unparse(statement)
        for block in ast.walk(tree)
        if isinstance(block, ast.With)
        for statement in block.body
        if isinstance(statement, ast.Import | ast.ImportFrom)
    ]
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "\n".join(late)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(re.findall(r"\| +([\w.]+)$", found.stderr, re.MULTILINE))
    assert {"torch", "bitsandbytes.nn.modules"} <= imported
    assert ("peft" in imported) is (stage != "quantize")
    assert "torch._inductor.compile_fx" not in imported


def test_it_is_imported_in_one_place() -> None:
    importing = [
        path
        for path in (ROOT / "stages").rglob("*.py")
        if re.search(r"^\s*(?:from|import) bitsandbytes", path.read_text(), re.MULTILINE)
    ]
    assert importing == [ROOT / "stages/shared/weights/bnb.py"]


def test_what_it_decorates_is_compiled_when_it_is_called_first() -> None:
    seen = []

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        seen.append(graph)
        return graph.forward

    decorated = bnb._compiled_when_called(backend=backend)(double)
    assert (decorated.__name__, seen) == ("double", [])
    for _ in range(2):
        assert decorated(torch.ones(3)).tolist() == [2, 2, 2]
    assert len(seen) == 1
    assert torch.compile.__module__ == "torch"
