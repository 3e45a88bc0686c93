"""Unfused experts: what the fused ones compute, under the names of the hub's files."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.shared.model import loading
from stages.shared.weights import experts
from stages.shared.weights.checkpoint import Weights
from tests.architectures import MIXTURES, saved

CPU = torch.device("cpu")
IDS = torch.randint(3, 380, (1, 40), generator=torch.Generator().manual_seed(1))


def test_every_family_is_tried() -> None:
    assert MIXTURES.keys() == experts.FAMILIES.keys()


@pytest.mark.parametrize("kind", MIXTURES)
def test_unfused_experts_compute_what_fused_do(tmp_path: Path, kind: str) -> None:
    base = saved(tmp_path, kind, MIXTURES[kind])
    fused = AutoModelForCausalLM.from_pretrained(base).eval()
    model = loading.load_model(base, CPU, torch.float32)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), experts.counted(model) as use:
        assert torch.equal(model(IDS).logits, fused(IDS).logits)
    config = model.config
    assert use.sum(1).tolist() == [40 * config.num_experts_per_tok] * len(experts.layers(model))
    model.save_pretrained(tmp_path / "again")
    assert Weights(tmp_path / "again").lazy_tensors().keys() == Weights(base).lazy_tensors().keys()


def test_an_expert_without_tokens_does_not_run(tmp_path: Path) -> None:
    model = loading.load_model(saved(tmp_path, "mixtral", MIXTURES["mixtral"]), CPU, torch.float32)
    layer = experts.layers(model)[0]
    ran: list[int] = []
    for number, expert in enumerate(layer):
        expert.register_forward_hook(lambda *_, number=number: ran.append(number))
    index = torch.tensor([[2, 0], [0, 2], [2, 0]])
    layer(torch.randn(3, 64), index, torch.full((3, 2), 0.5))
    assert ran == [0, 2]
