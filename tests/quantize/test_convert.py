"""The whole stage on models made on the spot, and what it refuses."""

import json
import resource
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.quantize import convert
from stages.quantize.__main__ import Params, Quantize, quantize
from stages.quantize.convert import describe, require_capability, require_fp16_range
from stages.shared.core import files
from stages.shared.core.errors import UserError, report
from stages.shared.core.params import validate
from stages.shared.model import loading
from stages.shared.weights.checkpoint import Weights
from tests import tiny
from tests.architectures import BESIDES, MIXTURES, OTHERS, saved

CPU = torch.device("cpu")
IDS = torch.arange(10, 42)[None]
LINEAR = 2 * (64 * 64 * 3 + 3 * 64 * 128)  # of the tiny model's two layers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


def settings(precision: str, compute_dtype: str = "bf16", double_quant: bool = True) -> Quantize:
    values = {"precision": precision, "double_quant": double_quant, "compute_dtype": compute_dtype}
    return validate(Params, {"quantize": values}).quantize


def run(base: Path, to: Path, *of: Any) -> dict[str, Any]:
    return quantize(base, to / "quantized", to / "quantize.svg", settings(*of), CPU)


@pytest.mark.parametrize(
    ("precision", "compute_dtype", "double_quant", "bits", "error"),
    [
        ("fp32", "bf16", True, 32, "none"),
        ("bf16", "bf16", True, 16, "none"),
        ("fp16", "bf16", True, 16, "none"),
        ("int8", "bf16", True, 8.5, "int8"),
        ("fp4", "fp16", False, 4.5, "fp4"),
        ("nf4", "fp32", False, 4.5, "nf4"),
        ("nf4", "bf16", True, 4.127, "nf4"),
    ],
)
def test_precision_has_its_bits_and_error(
    base: Path,
    tmp_path: Path,
    precision: str,
    compute_dtype: str,
    double_quant: bool,
    bits: float,
    error: str,
) -> None:
    report = run(base, tmp_path, precision, compute_dtype, double_quant)
    with torch.inference_mode():
        assert loading.load_model(tmp_path / "quantized", CPU)(IDS).logits.isfinite().all()
    assert report["linear_parameters"] == LINEAR
    assert report["parameters"] == LINEAR + 384 * 64 + 5 * 64
    assert report["quantized_parameters"] == (0 if error == "none" else LINEAR)
    assert report["bytes"] == (tmp_path / "quantized/model.safetensors").stat().st_size
    # Tables of 64 bytes and a description, and of 1024 bytes more, in each of 14 matrices.
    tables = 8 * 14 * 1344 / LINEAR if precision in ("fp4", "nf4") else 0.01
    assert bits - 0.2 <= report["bits_per_parameter"] <= bits + tables
    expected = report["errors"].get(error, 0.0)
    assert report["relative_error"] == pytest.approx(expected, rel=0.01, abs=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "fp4", "nf4"])
def test_bytes_are_those_of_transformers_and_repeat(
    base: Path, tmp_path: Path, precision: str
) -> None:
    reports = [run(base, tmp_path / name, precision) for name in ("one", "two")]
    assert reports[0] == reports[1]
    assert files.folder_sha256(tmp_path / "one") == files.folder_sha256(tmp_path / "two")
    theirs = tiny.quantize(tmp_path / "theirs", precision)
    for name in ("model.safetensors", "config.json"):
        assert files.sha256(tmp_path / "one/quantized" / name) == files.sha256(theirs / name)
    for path in (tmp_path / "one/quantized").glob("*.json"):  # nothing of this machine
        assert str(base.parent) not in path.read_text()
        assert "_name_or_path" not in path.read_text()


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_base_and_result_in_several_files(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    sharded = tmp_path / "sharded"
    tiny.model().to(torch.bfloat16).save_pretrained(sharded, max_shard_size=100_000)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    run(base, tmp_path / "whole", precision)
    monkeypatch.setattr(convert, "SHARD_BYTES", 60_000)
    run(sharded, tmp_path / "parts", precision)
    whole, parts = tmp_path / "whole/quantized", tmp_path / "parts/quantized"

    names = {path.name for path in parts.glob("*.safetensors")}
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert len(names) > 1
    assert names == set(index["weight_map"].values())
    expected, written = Weights(whole), Weights(parts)
    assert written.parameters == expected.parameters
    for stored in expected.parameters:
        assert torch.equal(written.values(stored, CPU), expected.values(stored, CPU))
    with torch.inference_mode():
        one, other = (loading.load_model(folder, CPU)(IDS).logits for folder in (whole, parts))
    assert torch.equal(one, other)


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_matrices_stored_in_by_out(tmp_path: Path, precision: str) -> None:
    base = saved(tmp_path / "base", "gpt2", BESIDES["gpt2"])
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    report = run(base, tmp_path, precision)
    expected = report["errors"].get(precision, 0.0)
    assert report["relative_error"] == pytest.approx(expected, rel=0.01)
    with torch.inference_mode():
        assert loading.load_model(tmp_path / "quantized", CPU)(IDS).logits.isfinite().all()


@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_every_expert_is_quantized(tmp_path: Path, kind: str, precision: str) -> None:
    """All but the routers of two layers, 4 × 64 each; `run` refuses what has more bits."""
    base = saved(tmp_path / "base", kind, MIXTURES[kind])
    report = run(base, tmp_path, precision)
    assert report["linear_parameters"] - report["quantized_parameters"] == 2 * 4 * 64


def test_experts_that_stay_dense_are_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama4_text", OTHERS["llama4_text"])
    with pytest.raises(UserError, match=r"nf4, 4\.\d+ bits .* \d\d\.\d+ were written: .*experts"):
        run(base, tmp_path / "out", "nf4")
    assert not any((tmp_path / "out").rglob("*"))
    assert run(base, tmp_path / "dense", "bf16")["bits_per_parameter"] == 16


def test_generation_config_is_kept_as_it_is(base: Path, tmp_path: Path) -> None:
    """Transformers would not write this one."""
    copy = shutil.copytree(base, tmp_path / "base")
    text = '{"do_sample": false, "temperature": 0.9, "top_p": 0.6}'
    (copy / "generation_config.json").write_text(text)
    run(copy, tmp_path, "bf16")
    assert (tmp_path / "quantized/generation_config.json").read_text() == text


def test_head_counts_as_embedding_under_its_saved_name(tmp_path: Path) -> None:
    """The head of a GPT-NeoX, a quarter of a small one, was counted among the matrices."""
    base = saved(tmp_path / "base", "gpt_neox", {})
    model = AutoModelForCausalLM.from_pretrained(base)
    embeddings = describe(model, Weights(base), CPU).embeddings
    assert embeddings < load_file(base / "model.safetensors").keys()
    assert len(embeddings) == 2


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
) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = 70_000.0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{key}; .*{name} holds 70144"):
        run(copy, tmp_path / "out", precision, compute_dtype)
    assert not any((tmp_path / "out").rglob("*"))


def test_masks_of_old_checkpoints_may_exceed_fp16(tmp_path: Path) -> None:
    masks = {"h.attn.masked_bias": torch.tensor(-1e9), "empty": torch.empty(0)}
    masks["h.attn.bias"] = torch.ones(4, 4, dtype=torch.bool)
    save_file(masks, tmp_path / "model.safetensors")
    require_fp16_range(Weights(tmp_path), settings("fp16"))


@pytest.mark.parametrize(
    ("precision", "compute_dtype", "capability", "problem"),
    [
        ("nf4", "bf16", (8, 0), None),
        ("nf4", "bf16", (7, 5), "quantize.compute_dtype is bf16"),
        ("bf16", "fp16", (7, 5), "quantize.precision is bf16"),
        ("nf4", "fp16", (7, 0), None),
        ("int8", "fp16", (7, 0), "quantize.precision is int8"),
        ("int8", "fp16", (7, 5), None),
    ],
)
def test_precision_that_the_device_lacks(
    precision: str, compute_dtype: str, capability: tuple[int, int], problem: str | None
) -> None:
    with pytest.raises(UserError, match=problem) if problem else nullcontext():
        require_capability(capability, settings(precision, compute_dtype))


def test_wrong_precision_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match=r"quantize\.precision is the text 'int4'; expected .*nf4"):
        settings("int4")


def test_full_disk_is_told_before_and_while_writing(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A limit on the size of a file stands in for the disk: the error is of the same kind."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "out").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(Exception, match="File too large") as raised:
            convert.convert(base, tmp_path / "out", settings("nf4"), CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    report(raised.value, "stages.quantize")
    assert "no room on the disk" in capsys.readouterr().err
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 100))
    with pytest.raises(UserError, match="the quantized model needs"):
        run(base, tmp_path / "none", "nf4")
