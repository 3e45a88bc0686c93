"""liger-kernel's kernels compute what the operations of torch beside them compute."""

import pytest
import torch

from stages.shared.step.fused import liger
from stages.shared.step.fused import mlp as feed_forward
from stages.shared.step.fused import qkv as attention
from stages.shared.step.fused import rms_norm as norm
from tests.train.emulation import DTYPES, EMULATED, assert_close, random

pytest.importorskip("liger_kernel", reason="liger-kernel is used where it is installed")

if EMULATED:  # which lacks libdevice
    from liger_kernel.ops import rms_norm
    from triton import language

    rms_norm.rsqrt = lambda x: language.rsqrt(x)  # noqa: PLW0108  (as it is when it runs)

TOKENS, WIDTH, HEADS, SHARED, SIZE, EPSILON = 21, 96, 6, 2, 16, 1e-5


def by(monkeypatch: pytest.MonkeyPatch, *, kernel: bool) -> None:
    monkeypatch.setattr(liger, "covers", lambda _: kernel)


@DTYPES
def test_norm_and_its_gradient(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x, weight = random(TOKENS, WIDTH, dtype=dtype), random(WIDTH, dtype=dtype, seed=1)
    gradient = random(TOKENS, WIDTH, dtype=dtype, seed=2)
    results = []
    for kernel in (False, True):
        by(monkeypatch, kernel=kernel)
        y, root = norm.rms_norm_forward(x, weight, EPSILON)
        again = norm.recompute_rms_norm(x, root, weight, EPSILON)
        results.append((y, root, again, norm.rms_norm_backward(gradient, x, root, weight)))
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected)


@DTYPES
def test_turning_there_and_back(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    query = random(TOKENS, HEADS * SIZE, dtype=dtype)
    key = random(TOKENS, SHARED * SIZE, dtype=dtype, seed=1)
    angles = random(TOKENS, SIZE // 2, dtype=torch.float32, seed=2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    before = query.clone()
    by(monkeypatch, kernel=False)
    expected = attention.apply_rope_qk(query, key, cos, sin)
    by(monkeypatch, kernel=True)
    found = attention.apply_rope_qk(query, key, cos, sin)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    assert torch.equal(query, before)
    for one, other in zip(attention.apply_rope_qk(*found, cos, -sin), (query, key), strict=True):
        assert_close(one, other)


@DTYPES
def test_the_gate(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    gate, up = (random(TOKENS, WIDTH, dtype=dtype, seed=seed) for seed in range(2))
    by(monkeypatch, kernel=False)
    expected = feed_forward.swiglu(gate.clone(), up.clone())
    by(monkeypatch, kernel=True)
    assert_close(feed_forward.swiglu(gate.clone(), up.clone()), expected)
