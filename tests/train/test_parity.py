"""Twenty steps against a plain loop that shares no code with ours but the libraries.

Of a mixture, the library's fused experts with the sum of weights and adapters in their place.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from stages.shared.model import loading
from stages.shared.step import adapter
from tests import tiny
from tests.architectures import MIXTURES, saved
from tests.train.running import settings, train_on

STEPS, BATCH, RATE, SEED = 20, 4, 5e-3, 42
CPU, SCALE = torch.device("cpu"), 32 / 4
GATED = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
Weights = dict[str, torch.Tensor]


def plain(
    logits: Callable[[torch.Tensor], torch.Tensor], learning: Sequence[Any], data: Path
) -> list[float]:
    """Losses, one conversation at a time, gradients accumulated."""
    table = pq.read_table(data / "train.parquet").to_pylist()
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        warmup = math.ceil(0.03 * STEPS)  # linear, then half a cosine down to zero
        part = (step - warmup) / (STEPS - warmup)
        factor = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * part))
        optimizer.param_groups[0]["lr"] = RATE * factor
        epoch, within = divmod(step, len(table) // BATCH)
        order = np.random.default_rng([SEED, epoch]).permutation(len(table))
        rows = [table[row] for row in order[within * BATCH : (within + 1) * BATCH]]
        supervised = sum(sum(row["loss_mask"][1:]) for row in rows)
        total = 0.0
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            labels = torch.where(torch.tensor([row["loss_mask"]]), ids, -100)[0, 1:]
            loss = cross_entropy(logits(ids)[0, :-1], labels, ignore_index=-100, reduction="sum")
            (loss / supervised).backward()
            total += (loss / supervised).item()
        torch.nn.utils.clip_grad_norm_(learning, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def dense(folder: Path, data: Path) -> tuple[list[float], Weights]:
    torch.manual_seed(SEED)
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, config).train()
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    losses = plain(lambda ids: model(input_ids=ids).logits, [*weights.values()], data)
    return losses, weights


def mixture(folder: Path, data: Path, kind: str) -> tuple[list[float], Weights]:
    """From the adapter that a training begins with."""
    torch.manual_seed(SEED)
    tuned = adapter.load_for_lora(folder, settings().lora, CPU)
    weights = {
        n.removeprefix("base_model.model."): p.detach().clone().requires_grad_()
        for n, p in tuned.named_parameters()
        if p.requires_grad
    }
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    gate, up, down = GATED[kind]

    def update(module: str) -> torch.Tensor:
        a, b = (weights[f"{module}.lora_{factor}.default.weight"] for factor in "AB")
        return SCALE * b @ a

    def updates(name: str) -> torch.Tensor | float:
        module, _, last = name.rpartition(".")
        each = [f"{module}.{expert}" for expert in range(4)]
        if last == "gate_up_proj":
            return torch.stack([torch.cat([update(f"{e}.{n}") for n in (gate, up)]) for e in each])
        if last == "down_proj":
            return torch.stack([update(f"{e}.{down}") for e in each])
        return update(module) if f"{module}.lora_A.default.weight" in weights else 0.0

    def logits(ids: torch.Tensor) -> torch.Tensor:
        summed = {n: p.detach() + updates(n) for n, p in base.named_parameters()}
        return functional_call(base, summed, (ids,)).logits

    losses = plain(logits, [*weights.values()], data)
    return losses, {f"base_model.model.{n}": p for n, p in weights.items()}


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe"])
def test_twenty_steps_are_those_of_a_plain_loop(tmp_path: Path, kind: str) -> None:
    data, model, kept = tiny.prepared(tmp_path / "prepared"), tmp_path / "fp32", tmp_path / "kept"
    if kind == "llama":
        tiny.quantize(model, "fp32")
    else:
        saved(model, kind, MIXTURES[kind])
    train = {"max_steps": STEPS, "epochs": 10, "batch_size": BATCH, "learning_rate": RATE}
    train["seed"] = SEED
    wanted = settings(**{f"train__{key}": value for key, value in train.items()})
    outcome = train_on(wanted, data, model, kept)
    losses, weights = dense(model, data) if kind == "llama" else mixture(model, data, kind)
    rows = outcome.history.rows
    assert [rows[s]["loss"] for s in range(1, STEPS + 1)] == pytest.approx(losses, rel=1e-4)
    assert outcome.metrics["best_step"] == STEPS  # what is kept is what the last step left
    found = dict(loading.attach(loading.load_model(model, CPU), kept).named_parameters())
    assert sum("lora_" in name for name in found) == len(weights)
    assert len(load_file(kept / "adapter_model.safetensors")) == len(weights)
    for name, weight in weights.items():
        assert (found[name] - weight).norm() <= 1e-3 * weight.norm(), name
