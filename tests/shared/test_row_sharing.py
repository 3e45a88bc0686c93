"""Conversations of one row do not see each other, whatever the architecture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.shared.model import loading, packing, scoring
from stages.shared.model.packing import PACKING, Example, may_pack
from tests.architectures import BESIDES, OTHERS, saved

CPU = torch.device("cpu")
LENGTHS = (40, 30, 9, 5)


def examples() -> list[Example]:
    random = np.random.default_rng(0)
    return [Example(random.integers(3, 384, n), np.arange(n) > 2, i) for i, n in enumerate(LENGTHS)]


@torch.no_grad()
def by_the_library(folder: Path) -> torch.Tensor:
    """Of each conversation by itself, with the attention that is written out in the library."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    losses = []
    for example in examples():
        ids = torch.tensor(example.input_ids)
        seen = ids[None, : example.input_tokens]
        likely = model(input_ids=seen, use_cache=False).logits[0].float().log_softmax(-1)
        losses.append(-likely[example.predictors, ids[1:][example.predictors]])
    return torch.cat(losses)


@torch.no_grad()
def packed(folder: Path) -> torch.Tensor:
    model = loading.load_model(folder, CPU, torch.float32)
    return scoring.negative_log_likelihoods(model, packing.pack(examples(), CPU))


@pytest.mark.parametrize("kind", sorted(PACKING))
def test_a_row_is_shared_by_conversations_that_do_not_see_each_other(
    tmp_path: Path, kind: str
) -> None:
    folder = saved(tmp_path, kind, BESIDES.get(kind, {}))
    assert may_pack(loading.load_model(folder, CPU).config)
    torch.testing.assert_close(packed(folder), by_the_library(folder), atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_would_mix_them_gets_each_by_itself(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path, kind, OTHERS[kind])
    assert not may_pack(loading.load_model(folder, CPU).config)
    torch.testing.assert_close(packed(folder), by_the_library(folder), atol=5e-5, rtol=0)
