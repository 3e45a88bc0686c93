"""What is read of a base, and what is written of it."""

import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.quantize import convert
from stages.quantize.config import Quantize
from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.model import loading
from stages.shared.weights.checkpoint import Weights
from tests import tiny

CPU = torch.device("cpu")
IDS = torch.arange(10, 42)[None]


def run(base: Path, folder: Path, precision: str) -> Path:
    settings = Quantize.model_validate(
        {"precision": precision, "double_quant": True, "compute_dtype": "bf16"}
    )
    folder.mkdir()
    convert.convert(base, folder, settings, CPU)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "base")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "fp4", "nf4"])
def test_the_bytes_are_those_that_transformers_writes(base: Path, tmp_path: Path, precision: str):
    ours = run(base, tmp_path / "ours", precision)
    theirs = tiny.quantize(tmp_path / "theirs", precision)
    for name in ("model.safetensors", "config.json"):
        assert files.sha256(ours / name) == files.sha256(theirs / name)


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_a_base_and_a_result_in_several_files(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
):
    sharded = tmp_path / "sharded"
    tiny.model().to(torch.bfloat16).save_pretrained(sharded, max_shard_size=100_000)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    whole = run(base, tmp_path / "whole", precision)
    monkeypatch.setattr(convert, "SHARD_BYTES", 60_000)
    parts = run(sharded, tmp_path / "parts", precision)

    names = {path.name for path in parts.glob("*.safetensors")}
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert len(names) > 1
    assert names == set(index["weight_map"].values())
    expected, found = Weights(whole), Weights(parts)
    assert found.parameters == expected.parameters
    for stored in expected.parameters:
        assert torch.equal(found.values(stored, CPU), expected.values(stored, CPU))
    with torch.inference_mode():
        one, other = (loading.load_model(folder, CPU)(IDS).logits for folder in (whole, parts))
    assert torch.equal(one, other)


def test_a_base_that_lacks_a_weight_is_refused(base: Path, tmp_path: Path):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        run(base, tmp_path / "out", "nf4")


def test_a_disk_that_is_full_in_the_middle(base: Path, tmp_path: Path):
    # A limit on the size of a file stands in for the disk: the system's error is of the same kind.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            run(base, tmp_path / "out", "nf4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / "out"))


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path: Path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    dtypes += [torch.float8_e5m2, torch.int64, torch.int32, torch.int16]
    tensors = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in dtypes} | {
        "scalar": torch.tensor(7, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "odd": torch.arange(5, dtype=torch.int8),
        "flags": torch.tensor([[True], [False]]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    for name, expected in tensors.items():
        found = weights.tensor(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
