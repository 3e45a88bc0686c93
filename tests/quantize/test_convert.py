from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.quantize.config import Params, Quantize
from stages.quantize.convert import device_problem, layout, quantization_config, require_fp16_range
from stages.shared.core.errors import UserError
from stages.shared.core.params import validate
from stages.shared.weights.checkpoint import Weights
from tests.architectures import saved


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


def test_the_range_of_fp16_is_that_of_weights(tmp_path: Path):
    """Checkpoints of old models hold masks, and the scalar to mask with."""
    weights = {
        "h.attn.bias": torch.ones(4, 4, dtype=torch.bool),
        "h.attn.masked_bias": torch.tensor(-1e9),
        "empty": torch.empty(0),
        "h.attn.weight": torch.ones(4, 4),
    }
    save_file(weights, tmp_path / "model.safetensors")
    require_fp16_range(Weights(tmp_path), settings("fp16"))
    save_file(weights | {"w": torch.full((2,), 1e5)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="w holds 100000, fp16"):
        require_fp16_range(Weights(tmp_path), settings("fp16"))


def test_what_is_looked_up_goes_by_the_names_of_the_files(tmp_path: Path):
    """The head of a GPT-NeoX, a quarter of a small one, was counted among the matrices."""
    base = saved(tmp_path / "base", "gpt_neox", {})
    model = AutoModelForCausalLM.from_pretrained(base)
    names = load_file(base / "model.safetensors").keys()
    looked_up = layout(model).looked_up
    assert looked_up < names
    assert len(looked_up) == 2
