"""A model in a folder: copied, left as it is, and exactly the bytes that were pinned."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.fetch_model.__main__ import fetch
from stages.shared.core import files
from stages.shared.core.errors import UserError
from tests import tiny
from tests.fetch_model.helpers import change_config, fetched, from_path


def test_a_folder_is_copied_and_left_as_it_is(mine: Path, tmp_path: Path) -> None:
    change_config(mine, _name_or_path="/home/me/tiny")
    before = files.folder_sha256(mine)
    base, tokenizer = fetched(from_path(mine), tmp_path / "out")
    assert files.folder_sha256(mine) == before
    assert {p.name for p in base.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    weights = base / "model.safetensors"
    assert files.sha256(weights) == files.sha256(mine / "model.safetensors")
    assert weights.stat().st_ino != (mine / "model.safetensors").stat().st_ino
    assert "_name_or_path" not in json.loads((base / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    alone = AutoTokenizer.from_pretrained(tokenizer)
    assert alone.encode("zwei und zwei") == tiny.tokenizer().encode("zwei und zwei")
    assert alone.eos_token == "<|im_end|>"


def test_the_hash_of_another_folder_is_refused_with_the_right_one(mine: Path) -> None:
    found = files.folder_sha256(mine)
    with pytest.raises(UserError, match=rf"model\.revision is '{'0' * 64}'.*{found}"):
        fetch(from_path(mine, "0" * 64), Path())
    with pytest.raises(UserError, match=r"model\.name is .*which is no folder"):
        fetch(from_path(mine / "none", "0" * 64), Path())
