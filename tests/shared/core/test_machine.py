"""The machine's settings: from the environment or .env, and never a parameter."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.shared.core import machine
from stages.shared.core.errors import UserError


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    machine.machine.cache_clear()
    yield tmp_path
    machine.machine.cache_clear()


def test_settings_are_of_the_environment_then_of_the_file(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / ".env").write_text("QLORA_MICRO_BATCH_TOKENS=64\nQLORA_MEMORY_BUDGET=7.5\nOTHER=1\n")
    monkeypatch.setenv("QLORA_MICRO_BATCH_TOKENS", "128")
    monkeypatch.setenv("QLORA_DEVICES", "")
    settings = machine.machine()
    assert (settings.micro_batch_tokens, settings.memory_budget) == (128, 7.5)
    assert (settings.device, settings.devices) == ("auto", None)  # unset


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"QLORA_MICRO_BATCH_TOKENS=many", r"QLORA_MICRO_BATCH_TOKENS .* is 'many'; expected"),
        (b"QLORA_WORKER=2", r"means nothing here; expected one of QLORA_WORKERS"),
        (b"# a comment\nqlora_memory_budgt = 4", r"means nothing here"),
        (b"QLORA_WORKERS=2\nHF_TOKEN=hf_secret", r"^HF_TOKEN .*\.env.: only QLORA_\* are read"),
        (b"HUGGING_FACE_HUB_TOKEN=hf_secret", r"^HUGGING_FACE_HUB_TOKEN .*: only QLORA_\*"),
        (b"http_proxy=secret", r"^http_proxy .*: only QLORA_\* are read from there"),
        (b"QLORA_DEVICES=1000000000", r"QLORA_DEVICES .*; expected less than or equal to"),
        (b"QLORA_MEMORY_BUDGET=inf", r"QLORA_MEMORY_BUDGET .* expected a finite number"),
        (b"# caf\xe9\n", r"\.env: byte 5 is not UTF-8"),
        (b"QLORA_NODES=2", r"^QLORA_ENDPOINT: not set, but QLORA_NODES is"),
        (b"QLORA_NODES=2\nQLORA_ENDPOINT=leader", r"QLORA_ENDPOINT .* is 'leader'"),
        (None, r"\.env: is a pipe"),
    ],
)
def test_a_wrong_setting_is_told(root: Path, content: bytes | None, told: str) -> None:
    """A mistyped QLORA_MEMORY_BUDGET would set no limit; a token in .env would go nowhere."""
    (root / ".env").write_bytes(content) if content else os.mkfifo(root / ".env")
    with pytest.raises(UserError, match=told) as caught:
        machine.machine()
    assert "secret" not in str(caught.value)


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_DEVICE", "cuda")
    with pytest.raises(UserError, match="QLORA_DEVICE is 'cuda'"):
        machine.device()
