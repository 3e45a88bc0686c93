"""Prepared rows on a terminal: supervised text in colour, elsewhere in brackets."""

import io

import pytest

from stages.prepare.__main__ import show
from stages.shared.core.errors import UserError
from tests.prepare.helpers import ROWS, Stage, row


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_supervised_text_is_marked(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.prepare([row("is it \x1b[31m", "é two"), *ROWS], eval_fraction=0.1)
    shown = []
    for stream in (io.StringIO(), Terminal()):
        show(stage.out / "train.parquet", stage.tokenizer, 2, stream)
        shown.append(stream.getvalue())
    assert "is it \\x1b[31m<|im_end|>\n<|im_start|>assistant\n[é two<|im_end|>]\n" in shown[0]
    assert "assistant\n\x1b[32mé two<|im_end|>\x1b[0m\n" in shown[1]
    assert shown[0].count("── row ") == 2
    monkeypatch.setenv("NO_COLOR", "1")
    show(stage.out / "train.parquet", stage.tokenizer, 2, stream := Terminal())
    assert stream.getvalue() == shown[0]
    with pytest.raises(UserError, match="--show: is 0"):
        show(stage.out / "train.parquet", stage.tokenizer, 0, stream)
