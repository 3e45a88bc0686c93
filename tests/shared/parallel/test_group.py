"""Joining a group that torchrun or Slurm has started: rank, size and addresses."""

import os
import socket

import pytest
import torch

from stages.shared.core.errors import UserError
from stages.shared.core.machine import machine
from stages.shared.parallel import group, launcher

SLURM = {
    "SLURM_JOB_ID": "41234",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.mark.parametrize(
    ("names", "first"),
    [("gpu[07-09,12],cpu1", "gpu07"), ("a", "a"), ("a,b", "a"), ("n-[3,7]", "n-3")],
)
def test_first_host_of_a_list(names: str, first: str) -> None:
    assert group.first_host(names) == first


def test_place_in_a_step_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    places = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in places:  # stale ones, which nobody has set for this process
        monkeypatch.setenv(name, "9")
    assert not group.is_started()
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert group.is_started()
    found = [os.environ[name] for name in places]
    assert found == ["5", "1", "8", "4", "gpu07", "21234"]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not group.is_started()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.delenv("SLURM_LOCALID")
    with pytest.raises(UserError, match=r"of srun one is missing or wrong \('SLURM_LOCALID'\)"):
        group.is_started()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="of torchrun one is missing or wrong"):
        group.is_started()


def test_unusable_endpoint_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^QLORA_ENDPOINT: 127.0.0.1:99999 cannot be reached"):
        group.own_address("127.0.0.1:99999")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        endpoint = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setenv("QLORA_NODES", "2")
        monkeypatch.setenv("QLORA_ENDPOINT", endpoint)
        machine.cache_clear()
        with pytest.raises(UserError, match=f"^QLORA_ENDPOINT: {endpoint} cannot be opened here"):
            launcher.launch(2, torch.device("cpu"), print)
    monkeypatch.undo()
    machine.cache_clear()


def test_own_address_is_that_towards_the_endpoint() -> None:
    assert group.own_address("127.0.0.1:29500") == "127.0.0.1"
