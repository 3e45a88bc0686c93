"""The tokenizer: alone in its folder, without code, and with an end of a reply."""

import json
from pathlib import Path

import pytest

from stages.shared.core.errors import UserError
from tests.fetch_model.helpers import fetched, from_path


def test_the_tokenizer_says_by_itself_what_the_config_said(mine: Path, tmp_path: Path) -> None:
    config = json.loads((mine / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["code.Tokenizer", None]}
    (mine / "tokenizer_config.json").write_text(json.dumps(config))
    (mine / "code.py").write_text("raise SystemExit('run')")
    _, tokenizer = fetched(from_path(mine), tmp_path / "out")
    assert "auto_map" not in json.loads((tokenizer / "tokenizer_config.json").read_text())
    assert not (tokenizer / "code.py").exists()


def test_a_tokenizer_without_an_end_is_refused(mine: Path, tmp_path: Path) -> None:
    config = json.loads((mine / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (mine / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no eos_token"):
        fetched(from_path(mine), tmp_path / "out")
