"""Unfused experts: what the fused ones compute, under the names of the hub's files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from stages.shared.model import loading
from stages.shared.weights import experts
from tests.architectures import MIXTURES, saved

SAFETENSORS = "model.safetensors"
CPU = torch.device("cpu")
IDS = torch.randint(3, 380, (1, 40), generator=torch.Generator().manual_seed(1))


def test_every_family_is_tried() -> None:
    assert MIXTURES.keys() == experts.FAMILIES.keys()


@pytest.mark.parametrize("kind", MIXTURES)
def test_unfused_experts_compute_what_fused_do(tmp_path: Path, kind: str) -> None:
    base = saved(tmp_path, kind, MIXTURES[kind])
    fused = AutoModelForCausalLM.from_pretrained(base).eval()
    model = loading.load_model(base, CPU, torch.float32)
    model.set_attn_implementation(fused.config._attn_implementation)
    with torch.no_grad(), experts.counted(model) as use:
        assert torch.equal(model(IDS).logits, fused(IDS).logits)
    config = model.config
    assert use.sum(1).tolist() == [40 * config.num_experts_per_tok] * len(experts.layers(model))
    experts.save(model, tmp_path / "again")
    before, after = load_file(base / SAFETENSORS), load_file(tmp_path / "again" / SAFETENSORS)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_an_expert_without_tokens_does_not_run(tmp_path: Path) -> None:
    model = loading.load_model(saved(tmp_path, "mixtral", MIXTURES["mixtral"]), CPU, torch.float32)
    layer = experts.layers(model)[0]
    ran: list[int] = []
    for number, expert in enumerate(layer):
        expert.register_forward_hook(lambda *_, number=number: ran.append(number))
    index = torch.tensor([[2, 0], [0, 2], [2, 0]])
    layer(torch.randn(3, 64), index, torch.full((3, 2), 0.5))
    assert ran == [0, 2]


def test_padded_experts_compute_what_unpadded_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tmp_path, "mixtral", MIXTURES["mixtral"])
    layer = experts.layers(loading.load_model(base, CPU, torch.float32).bfloat16())[0]
    random = torch.Generator().manual_seed(1)
    x = torch.randn(75, 64, generator=random).bfloat16().requires_grad_()
    index = torch.rand(75, 4, generator=random).topk(2).indices
    results = list[torch.Tensor]()
    for size in (experts.padded_size, lambda n: n):
        monkeypatch.setattr(experts, "padded_size", size)
        x.grad = None
        y = layer(x, index, torch.full((75, 2), 0.5))
        y.square().sum().backward()
        assert x.grad is not None
        results.append(torch.cat([y.detach(), x.grad]))
    assert torch.allclose(results[0], results[1], atol=1e-2, rtol=1e-2)
    monkeypatch.undo()
    sizes = {n: experts.padded_size(n) for n in (0, 1, 2, 9, 33, 64, 65, 200)}
    assert sizes == {0: 0, 1: 1, 2: 8, 9: 16, 33: 40, 64: 64, 65: 80, 200: 224}


def test_mxfp4_is_dequantized_expert_by_expert(tmp_path: Path) -> None:
    base = saved(tmp_path, "gpt_oss", MIXTURES["gpt_oss"])
    tensors, random = load_file(base / SAFETENSORS), torch.Generator().manual_seed(1)
    expected = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts_, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts_, rows, columns // 32, 16), generator=random)
        scales = torch.randint(120, 126, blocks.shape[:3], generator=random)
        packed = blocks.to(torch.uint8), scales.to(torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed
        expected[name] = convert_moe_packed_tensors(*packed)
    config = json.loads((base / "config.json").read_text())
    save_file(expected, base / SAFETENSORS, metadata={"format": "pt"})
    fused = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    save_file(tensors, base / SAFETENSORS, metadata={"format": "pt"})
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (base / "config.json").write_text(json.dumps(config))
    model = loading.load_model(base, CPU, torch.float32)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, fused(IDS).logits)
