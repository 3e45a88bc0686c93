"""The one loader: dtypes, and dequantized weights that are those of the forward pass."""

from pathlib import Path
from typing import cast

import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit
from torch import nn
from torch.nn.functional import linear

from stages.quantize.convert import convert
from stages.shared.core.errors import UserError
from stages.shared.model import loading
from stages.shared.weights import bnb, precision
from tests import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def quantized(folder: Path, kind: str, compute_dtype: str = "bf16") -> Path:
    (folder / kind).mkdir()
    settings = tiny.quantization(kind, compute_dtype)
    convert(tiny.save(folder / "base"), folder / kind, settings, CPU)
    return folder / kind


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("compute_dtype", ["bf16", "fp16", "fp32"])
def test_dequantized_weights_are_those_multiplied(
    tmp_path: Path, kind: str, compute_dtype: str
) -> None:
    folder = quantized(tmp_path, kind, compute_dtype)
    dense = loading.load_dequantized(folder, CPU)
    assert not bnb.quantized_layers(dense)
    assert {p.dtype for p in dense.parameters()} == {torch.float32}
    for name, layer in bnb.quantized_layers(loading.load_model(folder, CPU)).items():
        assert isinstance(layer, Linear4bit)
        weight = cast(nn.Linear, dense.get_submodule(name)).weight
        # Rows of the identity pick out the very weights that the layer multiplies with.
        identity = torch.eye(layer.in_features, dtype=layer.compute_dtype)
        assert torch.equal(layer(identity).float(), weight.T)
        inputs = torch.randn(5, layer.in_features, dtype=layer.compute_dtype)
        assert torch.equal(layer(inputs), linear(inputs, weight.to(layer.compute_dtype)))


def test_dequantized_int8_is_integers_times_scales(tmp_path: Path) -> None:
    folder = quantized(tmp_path, "int8")
    dense = loading.load_dequantized(folder, CPU)
    assert not bnb.quantized_layers(dense)
    for name, layer in bnb.quantized_layers(loading.load_model(folder, CPU)).items():
        weight = cast(Int8Params, layer.weight)
        expected = weight.data.float() * weight.SCB[:, None] / 127
        dequantized = cast(nn.Linear, dense.get_submodule(name)).weight
        assert torch.allclose(dequantized, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("compute", "stored"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_cpu_without_half_matmuls_computes_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: str, stored: torch.dtype
) -> None:
    """And dequantizes what a GPU rounded as the GPU does: a merge adds to those weights."""
    monkeypatch.setattr(precision, "has_bf16_matmuls", lambda device_type: device_type != "cpu")
    folder = quantized(tmp_path, "nf4", compute)
    assert loading.compute_dtype(folder, CPU) == torch.float32
    assert loading.compute_dtype(folder, CUDA) == stored
    model = loading.load_model(folder, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
    exact = loading.load_dequantized(folder, CPU)
    rounded = loading.load_dequantized(folder, CUDA)
    for name, layer in bnb.quantized_layers(model).items():
        assert layer.compute_dtype == torch.float32
        assert cast(Params4bit, layer.weight).quant_state.dtype == torch.float32
        weight = cast(nn.Linear, rounded.get_submodule(name)).weight
        expected = cast(nn.Linear, exact.get_submodule(name)).weight
        assert not torch.equal(weight, expected)
        assert torch.equal(weight, expected.to(stored).float())


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp16"])
def test_dense_parts_come_in_the_requested_dtype(tmp_path: Path, kind: str) -> None:
    model = loading.load_model(quantized(tmp_path, kind), CPU, torch.float32)
    dense = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert dense == {torch.float32}
    with torch.inference_mode():
        assert model(torch.arange(10, 42)[None]).logits.isfinite().all()


@pytest.mark.parametrize("has_bf16", [True, False])
def test_dense_model_is_only_cast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr(precision, "has_bf16_matmuls", lambda device_type: has_bf16)
    base = tiny.save(tmp_path)
    loaded = loading.load_model(base, CPU)
    assert loaded.dtype == (torch.bfloat16 if has_bf16 else torch.float32)
    assert not loaded.training
    for one, other in zip(
        loaded.parameters(), loading.load_dequantized(base, CPU).parameters(), strict=True
    ):
        assert other.dtype == torch.float32
        assert torch.equal(one.float(), other)


def test_folder_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        loading.load_model(tmp_path, CPU)
