"""The whole stage on models made on the spot."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from stages.quantize.__main__ import quantize
from stages.quantize.config import Quantize
from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.model import loading
from tests import tiny

CPU = torch.device("cpu")
IDS = torch.arange(10, 42)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


def run(
    base: Path, to: Path, precision: str, compute_dtype: str = "bf16", double_quant: bool = True
) -> dict[str, Any]:
    settings = Quantize.model_validate(
        {"precision": precision, "double_quant": double_quant, "compute_dtype": compute_dtype}
    )
    return quantize(base, to / "quantized", to / "quantize.svg", settings, CPU)


@pytest.mark.parametrize(
    ("precision", "compute_dtype", "double_quant", "bits", "error"),
    [
        ("fp32", "bf16", True, 32, "none"),
        ("bf16", "bf16", True, 16, "none"),
        ("fp16", "bf16", True, 16, "none"),
        ("int8", "bf16", True, 8.5, "int8"),
        ("fp4", "bf16", False, 4.5, "fp4"),
        ("fp4", "fp16", True, 4.127, "fp4"),
        ("nf4", "fp32", False, 4.5, "nf4"),
        ("nf4", "fp16", False, 4.5, "nf4"),
        ("nf4", "bf16", True, 4.127, "nf4"),
    ],
)
def test_every_precision_is_what_it_promises(
    base: Path,
    tmp_path: Path,
    precision: str,
    compute_dtype: str,
    double_quant: bool,
    bits: float,
    error: str,
):
    report = run(base, tmp_path, precision, compute_dtype, double_quant)
    model = loading.load_model(tmp_path / "quantized", CPU)
    with torch.inference_mode():
        logits = model(IDS).logits
    assert logits.isfinite().all()
    # Two layers of 64 × 64, 2 × 32 × 64, 64 × 64 and 3 × 64 × 128; the embedding is 384 × 64.
    linear = 2 * (64 * 64 * 3 + 3 * 64 * 128)
    assert report["linear_parameters"] == linear
    assert report["parameters"] == linear + 384 * 64 + 5 * 64
    assert report["quantized_parameters"] == (0 if error == "none" else linear)
    assert report["bytes"] == (tmp_path / "quantized/model.safetensors").stat().st_size
    # Tables of 64 bytes and a description, and of 1024 bytes more, in each of 14 matrices.
    tables = 8 * 14 * 1344 / linear if precision in ("fp4", "nf4") else 0.01
    assert bits - 0.2 <= report["bits_per_parameter"] <= bits + tables
    expected = report["errors"].get(error, 0.0)
    assert report["relative_error"] == pytest.approx(expected, rel=0.01, abs=1e-6)


def test_the_bytes_are_the_same_when_run_again(base: Path, tmp_path: Path):
    reports = [run(base, tmp_path / name, "nf4") for name in ("one", "two")]
    assert reports[0] == reports[1]
    assert files.folder_sha256(tmp_path / "one") == files.folder_sha256(tmp_path / "two")


def test_configs_say_nothing_of_this_machine(base: Path, tmp_path: Path):
    run(base, tmp_path, "nf4")
    for path in (tmp_path / "quantized").glob("*.json"):
        assert str(base.parent) not in path.read_text()
        assert str(tmp_path) not in path.read_text()
    assert "_name_or_path" not in json.loads((tmp_path / "quantized/config.json").read_text())


def test_a_generation_config_that_transformers_would_not_write_is_kept(base: Path, tmp_path: Path):
    copy = shutil.copytree(base, tmp_path / "base")
    text = '{"do_sample": false, "temperature": 0.9, "top_p": 0.6}'
    (copy / "generation_config.json").write_text(text)
    run(copy, tmp_path, "bf16")
    assert (tmp_path / "quantized/generation_config.json").read_text() == text


def test_experts_that_stay_dense_are_refused(tmp_path: Path):
    config = MixtralConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"nf4, 4\.\d+ bits .* 1\d\.\d+ were written: .*experts"):
        run(tmp_path / "base", tmp_path / "out", "nf4")
    assert not any((tmp_path / "out").rglob("*"))
    assert run(tmp_path / "base", tmp_path / "dense", "bf16")["bits_per_parameter"] == 16


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_matrices_that_are_stored_the_other_way_round(tmp_path: Path, precision: str):
    config = GPT2Config(vocab_size=384, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path / "base")
    report = run(tmp_path / "base", tmp_path, precision)
    expected = report["errors"].get(precision, 0.0)
    assert report["relative_error"] == pytest.approx(expected, rel=0.01)
    model = loading.load_model(tmp_path / "quantized", CPU)
    with torch.inference_mode():
        assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("precision", "compute_dtype", "key"),
    [
        ("fp16", "bf16", "precision is fp16"),
        ("int8", "bf16", "precision is int8"),
        ("nf4", "fp16", "compute_dtype is fp16"),
    ],
)
def test_weights_beyond_fp16_are_refused(
    base: Path, tmp_path: Path, precision: str, compute_dtype: str, key: str
):
    copy = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = 70_000.0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{key}; .*{name} holds 70144"):
        run(copy, tmp_path / "out", precision, compute_dtype)
    assert not any((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_refused(
    base: Path, tmp_path: Path, precision: str, name: str
):
    copy = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(copy / "model.safetensors")
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name.removesuffix('.weight')}.* holds NaN or infinity"):
        run(copy, tmp_path / "out", precision)
    assert not any((tmp_path / "out").rglob("*"))


def test_a_full_disk_is_told_before_it_is_written_to(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 100))
    with pytest.raises(UserError, match="the quantized model needs"):
        run(base, tmp_path / "out", "nf4")


def test_a_base_without_safetensors_is_refused(tmp_path: Path):
    (tmp_path / "base").mkdir()
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        run(tmp_path / "base", tmp_path, "nf4")
