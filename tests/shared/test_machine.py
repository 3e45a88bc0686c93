"""The machine's settings: from the environment or .env, and never a parameter."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.shared import machine
from stages.shared.errors import UserError


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


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_DEVICE", "cuda")
    with pytest.raises(UserError, match="QLORA_DEVICE is 'cuda'"):
        machine.device()
