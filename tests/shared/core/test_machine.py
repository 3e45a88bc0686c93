"""The machine's settings: from the environment or .env, and never a parameter."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.shared.core import machine
from stages.shared.core.errors import UserError


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    machine.machine.cache_clear()
    yield
    machine.machine.cache_clear()


def test_unset_means_chosen_by_the_project() -> None:
    settings = machine.machine()
    assert settings.device == "auto"
    assert settings.micro_batch_tokens is None


def test_a_file_at_the_root_is_read_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("QLORA_MICRO_BATCH_TOKENS=64\nQLORA_MEMORY_BUDGET=7.5\n")
    monkeypatch.setenv("QLORA_MICRO_BATCH_TOKENS", "128")
    assert machine.machine().micro_batch_tokens == 128
    assert machine.machine().memory_budget == 7.5


def test_a_wrong_value_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_MICRO_BATCH_TOKENS", "many")
    with pytest.raises(UserError, match=r"QLORA_MICRO_BATCH_TOKENS .* is 'many'; expected"):
        machine.machine()


@pytest.mark.parametrize("content", [b"QLORA_WORKER=2\n", b"# comment\nqlora_memory_budgt = 4\n"])
def test_a_name_that_means_nothing_is_told(tmp_path: Path, content: bytes) -> None:
    """A mistyped QLORA_MEMORY_BUDGET would set no limit."""
    (tmp_path / ".env").write_bytes(content)
    with pytest.raises(UserError, match=r"means nothing here; expected one of QLORA_DEVICE, "):
        machine.machine()


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN", "http_proxy"]
)
def test_a_name_that_only_the_shell_can_set_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / ".env").write_text(f"QLORA_WORKERS=2\n{name}=hf_secret\nOTHER=1\n")
    with pytest.raises(UserError, match=rf"^{name} \(.*\.env\): only QLORA_\* are read") as caught:
        machine.machine()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["QLORA_WORKERS", "QLORA_DEVICES", "QLORA_MEMORY_BUDGET"])
def test_numbers_have_maxima(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1000000000")
    with pytest.raises(UserError, match=f"{name} .*; expected less than or equal to"):
        machine.machine()


def test_a_pipe_in_its_place_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".env")
    with pytest.raises(UserError, match=r"\.env: is a pipe"):
        machine.machine()


def test_an_infinite_budget_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_MEMORY_BUDGET", "inf")
    with pytest.raises(UserError, match=r"QLORA_MEMORY_BUDGET .* expected a finite number"):
        machine.machine()


def test_a_file_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"# caf\xe9\nQLORA_WORKERS=2\n")
    with pytest.raises(UserError, match=r"\.env: byte 5 is not UTF-8"):
        machine.machine()


def test_an_empty_value_is_unset(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("QLORA_WORKERS=\n")
    assert machine.machine().workers is None


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_DEVICE", "cuda")
    with pytest.raises(UserError, match="QLORA_DEVICE is 'cuda'"):
        machine.device()


def test_nodes_need_the_endpoint_where_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_NODES", "2")
    with pytest.raises(UserError, match=r"^QLORA_ENDPOINT: not set, but QLORA_NODES is"):
        machine.machine()
    monkeypatch.setenv("QLORA_ENDPOINT", "leader")
    with pytest.raises(UserError, match=r"QLORA_ENDPOINT .* is 'leader'"):
        machine.machine()
