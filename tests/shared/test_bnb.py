"""How bitsandbytes is imported: without torch's compiler, and by one module alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.shared import bnb, rooms

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
    assert {"torch", "peft", "bitsandbytes.nn.modules"} <= imported
    assert "torch._inductor.compile_fx" not in imported


def test_it_is_imported_in_one_place() -> None:
    importing = [
        path
        for path in (ROOT / "stages").rglob("*.py")
        if re.search(r"^\s*(?:from|import) bitsandbytes", path.read_text(), re.MULTILINE)
    ]
    assert importing == [ROOT / "stages/shared/bnb.py"]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_matrix_is_dequantized_into_a_room_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(48, 80).to(dtype)
    codes, state = bnb.quantize_4bit(matrix, quant_type=kind, compress_statistics=False)
    found = bnb.dequantized(codes, state)
    assert torch.equal(found, bnb.dequantize_4bit(codes, state))
    with rooms.of_a_micro_batch(saving=False):
        with rooms.scratched():
            again = bnb.dequantized(codes, state)
            assert torch.equal(again, found)
        place = rooms.scratch(matrix.shape, dtype, matrix.device)
    assert again.data_ptr() == place.data_ptr() != found.data_ptr()


@pytest.mark.parametrize(
    ("shape", "block", "double_quant"), [((48, 80), 64, True), ((8, 4096), 2048, False)]
)
def test_what_the_function_of_a_cpu_does_not_cover_has_a_result_of_its_own(
    shape: tuple[int, int], block: int, double_quant: bool
) -> None:
    matrix = torch.randn(shape)
    codes, state = bnb.quantize_4bit(
        matrix, blocksize=block, quant_type="nf4", compress_statistics=double_quant
    )
    with rooms.of_a_micro_batch(saving=False):
        found = bnb.dequantized(codes, state)
        assert rooms.both()[1].place == rooms.Place()
    assert torch.equal(found, bnb.dequantize_4bit(codes, state))
