"""Bounds: what would take for ever, or all memory, ends; what the block changed is put back."""

import re
import resource
import signal
from collections.abc import Callable
from contextlib import nullcontext

import pyarrow as pa
import pytest
from transformers import PretrainedConfig

from stages.shared.core import bounds


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda: re.fullmatch("(.*)*x", "a" * 40), "0.1 seconds of CPU time"),
        (lambda: "x" * 10**11, "1.1 GB of memory"),
        (lambda: pa.array(["x" * 10**8]).take(pa.array([0] * 50)), "1.1 GB of memory"),
    ],
)
def test_limited_ends_what_takes_too_much(run: Callable[[], object], reason: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGPROF)
    seconds = 0.1 if "seconds" in reason else 60
    with pytest.raises(bounds.Exceeded, match=f"takes more than {reason}"), bounds.limited(seconds):
        run()
    assert before == (resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGPROF))
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_limited_passes_other_errors_on() -> None:
    with pytest.raises(KeyError), bounds.limited():
        raise KeyError("ours")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok is 5, more than num_e"),
        ({"n_group": 2, "topk_group": 3}, "topk_group is 3, more than n_group, 2"),
        ({"n_routed_experts": 8, "n_group": 3}, "n_group is 3, no divisor of n_routed_experts, 8"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "is 4, no divisor of num_att"),
        ({"num_hidden_layers": 10**5}, "num_hidden_layers is 100000"),
        ({"kv_lora_rank": 8, "num_attention_heads": 6, "num_key_value_heads": 4}, None),
        ({"num_experts": 1, "num_experts_per_tok": 2, "num_key_value_heads": None}, None),
    ],
)
def test_possible_sizes_are_compared(changes: dict[str, int], reason: str | None) -> None:
    config = PretrainedConfig(**changes)
    with pytest.raises(ValueError, match=reason) if reason else nullcontext():
        bounds.require_possible_sizes(config)
