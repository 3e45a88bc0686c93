"""What bitsandbytes and transformers do to weights, and what the one loader makes of it."""

from pathlib import Path
from typing import cast

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.quantize.__main__ import quantize
from stages.quantize.config import Quantize
from stages.shared.core.errors import UserError
from stages.shared.model import loading
from stages.shared.weights import bnb, precision
from tests import tiny

CPU = torch.device("cpu")
IDS = torch.arange(10, 42)[None]


def quantized(folder: Path, kind: str, compute_dtype: str = "bf16") -> Path:
    """A tiny model in a precision. Its sizes are multiples of 64, as the repacking wants them."""
    settings = Quantize.model_validate(
        {"precision": kind, "double_quant": True, "compute_dtype": compute_dtype}
    )
    base = tiny.save(folder / "base")
    quantize(base, folder / kind, folder / "quantize.svg", settings, CPU)
    return folder / kind


def gradient_norm(model: PreTrainedModel) -> float:
    """The norm of the embedding's gradient, which runs through every quantized layer."""
    model.train()
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    return float(gradient.float().norm())


def weight_bytes(model: nn.Module) -> list[torch.Tensor]:
    layers = bnb.quantized_layers(model).values()
    return [cast(torch.Tensor, layer.weight.data).clone() for layer in layers]


def evaluate(model: PreTrainedModel) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        return model(IDS).logits.clone()


def test_an_evaluation_changes_neither_weights_nor_gradients(tmp_path: Path):
    model = loading.load_model(quantized(tmp_path, "nf4"), CPU)
    before, weights = gradient_norm(model), weight_bytes(model)
    logits = evaluate(model)
    assert gradient_norm(model) == before
    assert all(map(torch.equal, weight_bytes(model), weights))
    assert torch.equal(evaluate(model), logits)


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no AVX512-BF16: nothing is repacked")
def test_without_the_guard_an_evaluation_changes_them(tmp_path: Path):
    folder = quantized(tmp_path, "nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    before, weights = gradient_norm(model), weight_bytes(model)
    evaluate(model)
    after = weight_bytes(model)
    assert len(after) == 14
    same = [torch.equal(a, w) for a, w in zip(after, weights, strict=True)]
    assert not any(same)
    assert gradient_norm(model) != pytest.approx(before, rel=0.01)


@pytest.mark.parametrize("precision", ["nf4", "fp4"])
@pytest.mark.parametrize("compute_dtype", ["bf16", "fp16", "fp32"])
def test_dequantized_weights_are_those_of_the_forward_pass(
    tmp_path: Path, precision: str, compute_dtype: str
):
    folder = quantized(tmp_path, precision, compute_dtype)
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


def test_int8_is_its_integers_times_their_scales(tmp_path: Path):
    folder = quantized(tmp_path, "int8")
    dense = loading.load_dequantized(folder, CPU)
    assert not bnb.quantized_layers(dense)
    for name, layer in bnb.quantized_layers(loading.load_model(folder, CPU)).items():
        weight = cast(Int8Params, layer.weight)
        expected = weight.data.float() * weight.SCB[:, None] / 127
        found = cast(nn.Linear, dense.get_submodule(name)).weight
        assert torch.allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("compute", "stored"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_what_a_cpu_has_no_products_of_is_computed_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: str, stored: torch.dtype
):
    monkeypatch.setattr(precision, "has_bf16_matmuls", lambda kind: kind != "cpu")
    folder = quantized(tmp_path, "nf4", compute)
    assert loading.compute_dtype(folder, CPU) == torch.float32
    assert loading.compute_dtype(folder, torch.device("cuda")) == stored
    model = loading.load_model(folder, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
    for layer in bnb.quantized_layers(model).values():
        assert layer.compute_dtype == torch.float32
        assert cast(Params4bit, layer.weight).quant_state.dtype == torch.float32


def test_what_a_gpu_rounded_is_dequantized_rounded_on_a_cpu_that_computes_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A merge adds to the weights that training saw, and most cards stand beside such a CPU."""
    monkeypatch.setattr(precision, "has_bf16_matmuls", lambda kind: kind != "cpu")
    folder = quantized(tmp_path, "nf4")
    exact = loading.load_dequantized(folder, CPU)
    rounded = dict(loading.load_dequantized(folder, torch.device("cuda")).named_modules())
    for name in bnb.quantized_layers(loading.load_model(folder, CPU)):
        found = cast(nn.Linear, rounded[name]).weight
        expected = cast(nn.Linear, exact.get_submodule(name)).weight
        assert not torch.equal(found, expected)
        assert torch.equal(found, expected.bfloat16().float())


@pytest.mark.parametrize("precision", ["nf4", "int8", "fp16"])
def test_what_is_not_quantized_comes_in_the_dtype_asked_for(tmp_path: Path, precision: str):
    model = loading.load_model(quantized(tmp_path, precision), CPU, torch.float32)
    dense = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert dense == {torch.float32}
    assert evaluate(model).isfinite().all()


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_dense_model_is_only_cast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_bf16: bool
):
    """To fp32 on a CPU without products of bf16, where torch has loops for them."""
    monkeypatch.setattr(precision, "has_bf16_matmuls", lambda kind: has_bf16)
    base = tiny.save(tmp_path)
    loaded = loading.load_model(base, CPU)
    assert loaded.dtype == (torch.bfloat16 if has_bf16 else torch.float32)
    assert not loaded.training
    for one, other in zip(
        loaded.parameters(), loading.load_dequantized(base, CPU).parameters(), strict=True
    ):
        assert other.dtype == torch.float32
        assert torch.equal(one.float(), other)


def test_a_folder_of_pickles_is_refused(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        loading.load_model(tmp_path, CPU)
