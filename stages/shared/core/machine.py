"""Settings of the machine, `QLORA_*`, from the environment or `.env`; no stage reruns for them."""

import os
import re
import sys
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dotenv import dotenv_values
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from stages.shared.core.errors import UserError, require_regular

if TYPE_CHECKING:
    import torch

PREFIX = "QLORA_"
# What libraries and pip read from the environment alone: in .env it would have no effect.
_ENVIRONMENT_ONLY = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS|PIP|CUDA|DVC)_.*|.*_PROXY", re.I)


class Machine(BaseSettings):
    """The settings; unset means that the project chooses."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True
    )

    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int | None = Field(default=None, ge=1, le=1024)  # share a step; unset: all GPUs
    workers: int | None = Field(default=None, ge=1, le=1024)  # without effect: see `machine`
    micro_batch_tokens: int | None = Field(default=None, ge=1, le=2**24)
    gradient_checkpointing: bool | None = None
    fused: bool = True  # false: a step is computed by the library's own modules
    memory_budget: float | None = Field(default=None, gt=0, le=1e6, allow_inf_nan=False)  # GiB
    checkpoint_steps: int = Field(default=25, ge=1, le=10**9)
    keep_checkpoints: int = Field(default=2, ge=1, le=10**6)
    nodes: int = Field(default=1, ge=1, le=10**4)  # hosts that share a step
    restarts: int = Field(default=1, ge=0, le=10**6)  # of a group that lost a process
    shard: Literal["auto", "true", "false"] = "auto"  # weights; auto: where they do not fit
    endpoint: str | None = Field(default=None, pattern=r"^[^\s:]+:[0-9]{1,5}$")  # of the leader
    verify: bool = False  # true: every dependency is hashed before it is read, not just new ones


def root() -> Path:
    """The repository's root; in a temporary copy for an experiment, DVC names it in `DVC_ROOT`."""
    return Path(os.environ.get("DVC_ROOT", "."))


@cache
def machine() -> Machine:
    """The settings of this machine, read once; a wrong value or name raises a UserError."""
    file = require_regular(root() / ".env")
    known = [f"{PREFIX}{field}".upper() for field in Machine.model_fields]
    try:
        values = dotenv_values(file)
        for name in sorted({*os.environ, *values}):
            if name.upper().startswith(PREFIX) and name.upper() not in known:
                meant = get_close_matches(name.upper(), known) or known
                what = f"means nothing here; expected one of {', '.join(meant)}"
                raise UserError(f"{name} (environment or .env) {what}. Rename or remove it.")
        for name in filter(_ENVIRONMENT_ONLY.fullmatch, values):
            advice = "Remove it, and export it in your shell (a token: or run `hf auth login`)."
            raise UserError(f"{name} ({file}): only QLORA_* are read from there. {advice}")
        settings = Machine(_env_file=file)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8. Save it as UTF-8.") from None
    except ValidationError as error:
        first = error.errors()[0]
        name = f"{PREFIX}{'_'.join(str(part) for part in first['loc'])}".upper()
        what = f"is {first['input']!r}; expected {first['msg'].removeprefix('Input should be ')}"
        raise UserError(f"{name} (environment or .env) {what}") from None
    if settings.nodes > 1 and settings.endpoint is None:
        advice = "Set it to host:port of this machine, where the other hosts meet it."
        raise UserError(f"QLORA_ENDPOINT: not set, but QLORA_NODES is. {advice}")
    if settings.workers is not None:
        # Two on two cores: 4 to 7 % slower in bf16, as fast in fp32, 0.2 GB more.
        print("QLORA_WORKERS has no effect: one process uses all cores.", file=sys.stderr)
    return settings


def device() -> "torch.device":
    """The device that everything runs on: `QLORA_DEVICE`, or CUDA where there is one."""
    import torch  # noqa: PLC0415  (seconds that a stage without tensors need not pay)

    requested, is_there = machine().device, torch.cuda.is_available()
    if requested == "cuda" and not is_there:
        what = "this machine has no CUDA device that torch can use"
        raise UserError(f"QLORA_DEVICE is 'cuda'; {what}. Unset it, or set it to cpu.")
    return torch.device("cuda" if is_there and requested != "cpu" else "cpu")
