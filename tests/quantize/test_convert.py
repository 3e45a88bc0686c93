import pytest
import torch

from stages.quantize.convert import device_problem
from stages.quantize.loading import quantization_config
from stages.quantize.settings import Params, Quantize
from stages.shared.errors import UserError
from stages.shared.params import validate


def settings(precision: str, compute_dtype: str = "bf16", double_quant: bool = True) -> Quantize:
    values = {
        "precision": precision,
        "double_quant": double_quant,
        "compute_dtype": compute_dtype,
    }
    return validate(Params, {"quantize": values}).quantize


def test_a_wrong_precision_is_told_in_one_line():
    with pytest.raises(
        UserError, match=r"quantize\.precision is the text 'int4'; expected .*'nf4'"
    ):
        settings("int4")


@pytest.mark.parametrize(
    ("precision", "compute_dtype", "dense"),
    [("fp32", "bf16", "fp32"), ("fp16", "bf16", "fp16"), ("nf4", "fp16", "fp16")],
)
def test_what_the_dense_parts_are_stored_in(precision: str, compute_dtype: str, dense: str):
    assert settings(precision, compute_dtype).dense_dtype == dense


def test_what_bitsandbytes_is_asked_for():
    assert quantization_config(settings("bf16")) is None
    int8 = quantization_config(settings("int8"))
    assert int8 is not None
    assert int8.load_in_8bit
    fp4 = quantization_config(settings("fp4", "fp16", double_quant=False))
    assert fp4 is not None
    assert (fp4.bnb_4bit_quant_type, fp4.bnb_4bit_use_double_quant) == ("fp4", False)
    assert fp4.bnb_4bit_compute_dtype == torch.float16


@pytest.mark.parametrize(
    ("precision", "compute_dtype", "capability", "problem"),
    [
        ("nf4", "bf16", None, None),
        ("nf4", "bf16", (8, 0), None),
        ("nf4", "bf16", (7, 5), "quantize.compute_dtype is bf16"),
        ("bf16", "fp16", (7, 5), "quantize.precision is bf16"),
        ("nf4", "fp16", (7, 0), None),
        ("int8", "fp16", (7, 0), "quantize.precision is int8"),
        ("int8", "fp16", (7, 5), None),
    ],
)
def test_a_precision_that_the_device_cannot_do(
    precision: str, compute_dtype: str, capability: tuple[int, int] | None, problem: str | None
):
    found = device_problem(settings(precision, compute_dtype), capability)
    assert (found is None) if problem is None else (found or "").startswith(problem)
