"""Twenty steps against a plain loop that shares no code with ours but the libraries."""

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from tests import tiny
from tests.train.running import run

STEPS, BATCH, RATE, SEED = 20, 4, 5e-3, 42


def plain(model_folder: Path, data: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One conversation at a time, gradients accumulated; returns losses and the adapter."""
    table = pq.read_table(data / "train.parquet").to_pylist()
    torch.manual_seed(SEED)
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    base = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(base, config).train()
    learning = [p for p in model.parameters() if p.requires_grad]
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
            logits = model(input_ids=ids).logits[0, :-1]
            loss = cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / supervised
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learning, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return losses, {n.replace(".default", ""): p for n, p in weights.items()}


def test_twenty_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    data = tiny.prepared(tmp_path / "prepared")
    metrics, curve, kept = run(
        tmp_path,
        data,
        "fp32",
        train__max_steps=STEPS,
        train__epochs=10,
        train__batch_size=BATCH,
        train__learning_rate=RATE,
        train__seed=SEED,
    )
    assert metrics["best_step"] == STEPS  # what is kept is what the last step left
    losses, weights = plain(tmp_path / "quantized", data)
    assert [curve.rows[s]["loss"] for s in range(1, STEPS + 1)] == pytest.approx(losses, rel=1e-4)
    found = load_file(kept / "adapter_model.safetensors")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert (found[name] - weight).norm() <= 1e-3 * weight.norm(), name
