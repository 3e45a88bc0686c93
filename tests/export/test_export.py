"""Exported folders: verified, portable, and refused by name where they cannot be had."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.export import __main__ as stage
from stages.export.export import require_adapter, serving
from stages.export.llama_cpp import Architecture, Unsupported
from stages.shared.core import files, params
from stages.shared.core.errors import UserError
from tests import tiny
from tests.llama import opened
from tests.merge.test_merge import merge, trained

ALL = ["gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q4_0", "gguf-lora", "vllm-lora"]
PROMPT = "<|im_start|>user\nWhat is 3?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model trained and merged."""
    folder = tmp_path_factory.mktemp("tuned")
    trained(folder, "nf4", train__epochs=6)
    merge(folder, folder)
    return folder


def exported(folder: Path, out: Path, formats: list[str]) -> dict[str, Any]:
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MERGED", "ADAPTER", "QUANTIZED", "PREPARED"):
            patch.setattr(stage, name, folder / name.lower())
        return stage.export(formats, out)


@pytest.fixture(scope="module")
def everything(
    tuned: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "exported"
    return out, exported(tuned, out, ALL)


def test_every_format_is_verified(everything: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = everything
    assert metrics["status"] == "exported"
    assert sorted(path.name for path in folder.iterdir()) == sorted(ALL)
    for name in ("gguf-f16", "gguf-lora"):
        assert metrics[name]["top1_agreement"] >= 0.99
        assert metrics[name]["kl_divergence"] < 1e-3
    assert metrics["gguf-q8_0"]["top1_agreement"] >= 0.98
    assert metrics["gguf-q8_0"]["kl_divergence"] < metrics["gguf-q4_0"]["kl_divergence"]
    assert metrics["gguf-f16"]["loss"] == pytest.approx(metrics["merged_loss"], abs=1e-3)
    for name in ALL:
        assert metrics[name]["bytes"] == files.folder_bytes(folder / name)
    assert not list(folder.rglob("*.partial"))


def test_llama_cpp_adds_the_adapter(tuned: Path, everything: tuple[Path, dict[str, Any]]) -> None:
    folder = everything[0] / "gguf-lora"
    base = AutoModelForCausalLM.from_pretrained(
        everything[0] / "vllm-lora/base", dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, everything[0] / "vllm-lora/adapter").eval()
    ids = AutoTokenizer.from_pretrained(tuned / "merged").encode(PROMPT)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    with opened(folder / "base.gguf", folder / "adapter.gguf") as llama:
        predicted = llama.next_token(ids)
    with opened(folder / "base.gguf") as llama:
        untuned = llama.next_token(ids)
    assert next(iter(predicted)) == expected.argmax()
    for token, logp in predicted.items():
        assert logp == pytest.approx(expected[token].item(), abs=0.1)
    assert untuned != predicted


def test_exported_folders_name_no_other_folder(
    tuned: Path, everything: tuple[Path, dict[str, Any]]
) -> None:
    for path in everything[0].rglob("*"):
        if path.is_file():
            assert str(tuned).encode() not in path.read_bytes(), path
    adapter = files.read_json(everything[0] / "vllm-lora/adapter/adapter_config.json")
    assert adapter["base_model_name_or_path"] == "../base"
    path = everything[0] / "vllm-lora/adapter/adapter_config.json"
    assert "--max-lora-rank 8 --lora-modules tuned=" in serving(path.parents[1])
    files.write_json(path, adapter | {"rank_pattern": {".*gate_up_proj": 16}})  # of a mixture
    assert "--max-lora-rank 16 --lora-modules tuned=" in serving(path.parents[1])
    files.write_json(path, adapter)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "vllm-lora has no place for an adapter with use_dora"),
        ({"modules_to_save": ["lm_head"], "bias": "all"}, "modules_to_save, bias"),
        ({"r": 1024}, "rank 1024"),
    ],
)
def test_vllm_adapters_are_refused_by_name(
    tuned: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    adapter = shutil.copytree(tuned / "adapter", tmp_path / "adapter")
    require_adapter(adapter, ["gguf-lora", "vllm-lora"])
    described = files.read_json(adapter / "adapter_config.json")
    files.write_json(adapter / "adapter_config.json", described | changes)
    with pytest.raises(Unsupported, match=reason):
        require_adapter(adapter, ["vllm-lora"])


def test_default_of_another_architecture_ends_well(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "other")
    path = tmp_path / "other/merged/config.json"
    files.write_json(path, files.read_json(path) | {"model_type": "gpt2"})
    metrics = exported(tmp_path / "other", tmp_path / "out", ["gguf-q8_0"])
    assert metrics["status"].startswith("not exported: gpt2 is none of llama, mistral")
    assert "convert_hf_to_gguf.py" in metrics["status"]
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UserError, match=r"export\.formats: gpt2 is none of .*convert_hf_to_gguf"):
        exported(tmp_path / "other", tmp_path / "named", ["gguf-f16"])


def test_full_disk_is_told_before_a_file_is_written(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=1000))
    with pytest.raises(UserError, match=r"free; the file gguf-q8_0 needs 0\.00 GB\. Free some"):
        exported(tuned, tmp_path / "out", ["gguf-q8_0"])
    assert not list((tmp_path / "out").rglob("*.gguf"))


def test_disagreement_is_refused(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose heads stand in another order than they are read in."""
    ordered = Architecture.reorder
    wrong = lambda self, key, rows, back=False: ordered(self, key, rows)  # noqa: E731
    monkeypatch.setattr(Architecture, "reorder", wrong)
    with pytest.raises(UserError, match=r"gguf-f16 agrees with the model in 0\.\d+ of the most"):
        exported(tuned, tmp_path / "out", ["gguf-f16"])


def test_named_formats_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(tmp_path / "models/base")
    tiny.tokenizer().save_pretrained(tmp_path / "models/tokenizer")
    monkeypatch.chdir(tmp_path)
    values = {"export": {"formats": ["gguf-f16"]}}
    params.validate(stage.Params, values, "train")
    with pytest.raises(UserError, match="expected each format once"):
        params.validate(stage.Params, {"export": {"formats": ["gguf-f16"] * 2}}, "train")
    path = tmp_path / "models/base/config.json"
    files.write_json(path, files.read_json(path) | {"model_type": "gpt2"})
    with pytest.raises(UserError, match="gpt2 is none of"):
        params.validate(stage.Params, values, "train")
    params.validate(stage.Params, values, "fetch_model")  # which brings another model
    default = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())["export"]
    params.validate(stage.Params, {"export": default}, "train")
