"""Initial LoRA weights: at the base, at its principal part, at what quantization lost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages.shared.core import files
from stages.shared.model import loading
from stages.shared.step import initialisation
from stages.shared.weights import bnb
from tests import tiny
from tests.shared.step.adapters import CPU, exactly, layers, load, logits, update
from tests.train.running import settings, train_on


def decaying(rows: int, columns: int) -> torch.Tensor:
    """A random matrix whose singular values fall slowly, as those of weights do."""
    torch.manual_seed(3)
    u, _ = torch.linalg.qr(torch.randn(rows, rows))
    v, _ = torch.linalg.qr(torch.randn(columns, columns))
    values = torch.arange(1, min(rows, columns) + 1) ** -0.3
    return u[:, : len(values)] * values @ v[:, : len(values)].T


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_svd_factors_approximate_best(shape: tuple[int, int]) -> None:
    matrix, rank, scale = decaying(*shape), 8, 4.0
    a, b = initialisation.svd_factors(matrix, rank, scale)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    best = torch.linalg.norm(matrix - u[:, :rank] * s[:rank] @ v[:rank])
    assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
    assert torch.linalg.norm(matrix - scale * b @ a) <= 1.001 * best
    assert torch.allclose(torch.linalg.norm(a), torch.linalg.norm(b), rtol=1e-4)


def test_qr_factors_are_the_first_of_the_decomposition() -> None:
    matrix = decaying(48, 32)
    q, r = torch.linalg.qr(matrix)
    a, b = initialisation.qr_factors(matrix, 8, 1.0)
    assert torch.allclose(b, q[:, :8], atol=1e-5)
    assert torch.allclose(a, r[:8], atol=1e-5)


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("lora", [{"init": "pissa"}, {"init": "olora", "rslora": True}])
def test_frozen_initialisation_starts_at_the_base(
    tmp_path: Path, precision: str, lora: dict[str, Any]
) -> None:
    """And leaves the base's weights alone."""
    model = load(tmp_path, precision, r=8, **lora)
    base = loading.load_model(tmp_path / precision, CPU)
    state = model.get_base_model().state_dict()
    for name, before in base.state_dict().items():
        now = state.get(name, state.get(".base_layer.".join(name.rsplit(".", 1))))
        if isinstance(before, torch.Tensor) and now is not None:
            assert torch.equal(now, before), name
    assert len(bnb.quantized_layers(base)) == len(bnb.quantized_layers(model))

    assert torch.equal(logits(model, torch.bfloat16), logits(base, torch.bfloat16))
    expected = logits(loading.load_dequantized(tmp_path / precision, CPU), torch.float32)
    assert torch.allclose(exactly(tmp_path, model, precision), expected, atol=1e-4)


def test_pissa_starts_at_the_principal_part(tmp_path: Path) -> None:
    model = load(tmp_path, r=8, alpha=8, init="pissa")
    dense = loading.load_dequantized(tmp_path / "nf4", CPU)
    for name, layer in layers(model).items():
        a, b = (m["default"].parametrizations.weight.original for m in (layer.lora_A, layer.lora_B))
        matrix = dense.get_submodule(name).weight
        best = torch.linalg.svdvals(matrix)[8:].square().sum().sqrt()
        assert torch.linalg.norm(matrix - layer.scaling["default"] * b @ a) <= 1.002 * best
        assert torch.linalg.norm(update(layer)) < 1e-5 * torch.linalg.norm(matrix)


@pytest.mark.parametrize("rslora", [False, True])
def test_frozen_half_is_not_trained(tmp_path: Path, rslora: bool) -> None:
    """Nor changed by weight decay, which needs no gradient."""
    start = initialisation.ordinary_state(load(tmp_path, init="pissa", rslora=rslora))
    params = settings(
        lora__init="pissa", lora__rslora=rslora, train__weight_decay=0.1, train__epochs=1
    )
    data = tiny.prepared(tmp_path / "prepared")
    outcome = train_on(params, data, tmp_path / "nf4", tmp_path / "adapter")
    ordinary = load(tmp_path, rslora=rslora)
    trainable = sum(p.numel() for p in ordinary.parameters() if p.requires_grad)
    assert outcome.metrics["trainable_parameters"] == trainable
    assert files.read_json(tmp_path / "adapter" / "adapter_config.json")["r"] == 8
    loaded = loading.load_adapted(tmp_path / "adapter", tmp_path / "nf4", CPU)
    scales = [next(iter(layers(m).values())).scaling["default"] for m in (loaded, ordinary)]
    assert scales[0] == pytest.approx(scales[1])
    for name, now in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        dim = 0 if "lora_A" in name else 1
        before = start[name.removesuffix(".weight") + ".default.weight"]
        same = [
            torch.equal(*halves)
            for halves in zip(now.chunk(2, dim), before.chunk(2, dim), strict=True)
        ]
        assert same == [False, True], name


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_initialisation_is_reproduced_to_the_bit(tmp_path: Path, init: str) -> None:
    """A checkpoint holds what is trained; frozen halves come from a model loaded anew."""
    first, second = (initialisation.ordinary_state(load(tmp_path, init=init)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first if "lora_" in name)


@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("lora", [{"alpha": 16}, {"alpha": 8, "rslora": True}])
def test_loftq_starts_closer_to_the_original(
    tmp_path: Path, precision: str, lora: dict[str, Any]
) -> None:
    model = load(tmp_path, precision, r=8, init="loftq", **lora)
    original = loading.load_model(tmp_path / "base", CPU, torch.float32)
    dequantized = loading.load_dequantized(tmp_path / precision, CPU)
    for name, layer in layers(model).items():
        lost = original.get_submodule(name).weight - dequantized.get_submodule(name).weight
        assert torch.linalg.norm(lost - update(layer)) < 0.95 * torch.linalg.norm(lost), name

    expected = logits(original, torch.float32).log_softmax(-1)
    divergences = [
        torch.nn.functional.kl_div(
            result.log_softmax(-1), expected, log_target=True, reduction="batchmean"
        )
        for result in (exactly(tmp_path, model, precision), logits(dequantized, torch.float32))
    ]
    assert divergences[0] < 0.9 * divergences[1]


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_dora_starts_at_the_base(tmp_path: Path, init: str) -> None:
    """Peft rounds the magnitudes to the base's bf16: logits then begin 0.09 away from it."""
    model = load(tmp_path, dora=True, init=init)
    expected = logits(loading.load_dequantized(tmp_path / "nf4", CPU), torch.float32)
    assert torch.allclose(exactly(tmp_path, model, "nf4"), expected, atol=1e-4)
