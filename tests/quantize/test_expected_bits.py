import pytest

from stages.quantize import convert
from stages.shared.core.errors import UserError
from stages.shared.weights.checkpoint import Stored
from stages.shared.weights.precision import DENSE_BYTES, stored_bytes
from tests.tiny import quantization

SHAPE = (64, 256)  # 16,384 parameters, 256 blocks: one constant of constants


def matrix(name: str, kind: str, size: int) -> Stored:
    parts = {} if kind in DENSE_BYTES else {"constants": f"{name}.constants"}
    return Stored(name, SHAPE, kind, size, parts)


@pytest.mark.parametrize(
    ("precision", "double_quant", "size", "bits"),
    [
        ("fp32", False, 65_536, 32),
        ("bf16", True, 32_768, 16),
        ("fp16", True, 32_768, 16),
        ("int8", True, 16_384 + 64 * 4, 8.125),
        ("nf4", False, 8_192 + 256 * 4, 4.5),
        ("nf4", True, 8_192 + 256 + 4, 4.127),
        ("fp4", True, 8_192 + 256 + 4, 4.127),
    ],
)
def test_expected_bytes_by_hand(precision: str, double_quant: bool, size: int, bits: float):
    assert stored_bytes(SHAPE, precision, double_quant) == size
    assert 8 * size / 16_384 == pytest.approx(bits, abs=5e-4)


def test_expected_bits_allow_for_tables():
    size = stored_bytes(SHAPE, "nf4", True) + 64 + 1024 + 190
    matrices = [matrix("a", "nf4", size), matrix("b", "nf4", size)]
    convert.require_expected_bits(matrices, quantization("nf4"))


def test_one_dense_matrix_among_many_is_refused():
    good = stored_bytes(SHAPE, "int8", False)
    matrices = [matrix(f"layer.{i}", "int8", good) for i in range(60)]
    matrices.append(matrix("layer.60.experts", "bf16", 32_768))
    with pytest.raises(UserError, match=r"int8, 8\.12 bits.*layer\.60\.experts is bf16.*2%"):
        convert.require_expected_bits(matrices, quantization("int8"))


def test_fewer_bits_than_expected_are_refused():
    with pytest.raises(UserError, match="bf16"):
        convert.require_expected_bits([matrix("a", "nf4", 8_452)], quantization("bf16"))


def test_embedding_head_and_vectors_do_not_count():
    parameters = [
        matrix("embed", "bf16", 32_768),
        matrix("head", "bf16", 32_768),
        matrix("linear", "bf16", 32_768),
        Stored("norm", (64,), "bf16", 128, {}),
    ]
    found = convert.linear_matrices(parameters, frozenset({"embed", "head"}))
    assert [m.name for m in found] == ["linear"]
