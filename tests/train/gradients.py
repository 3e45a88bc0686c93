"""The gradient of one step, computed in ways that must not matter; run in processes of its own."""

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from stages.shared.model.packing import Example, read_examples
from stages.shared.step import adapter, gradient
from stages.shared.step.fused.patch import fuse
from stages.train import distributed
from stages.train.distributed import Group
from tests.train.running import settings

CPU = torch.device("cpu")
Gradients = dict[str, np.ndarray]  # by the parameter's name


def learning_model(model_folder: Path, checkpointing: bool = False) -> PeftModel:
    """An adapter that has moved: with B at zero, no gradient would reach A."""
    torch.manual_seed(1)
    model = adapter.load_for_lora(model_folder, settings().lora, CPU)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def chosen(data: Path, rows: list[int]) -> list[Example]:
    examples = read_examples(data / "train.parquet")
    return [examples[row] for row in rows]


def of_step(
    among: Group,
    where: torch.device,
    model_folder: Path,
    data: Path,
    rows: list[int],
    micro_batch_tokens: int,
    checkpointing: bool,
    attention: str | None = None,
    path: str = "fused",
    workers: int = 1,
    steps: int = 1,
) -> tuple[float, Gradients]:
    """Loss and gradients of the last of some equal steps, as the loop computes them."""
    model = learning_model(model_folder, checkpointing)
    if attention:
        model.set_attn_implementation(attention)
    if path == "fused":
        fuse(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    examples = chosen(data, rows)
    supervised = sum(example.supervised_tokens for example in examples)

    def accumulate(group: Group) -> float:
        parts = group.divide(examples, micro_batch_tokens)
        own = parts[group.rank] if group.rank < len(parts) else []
        model.zero_grad()
        loss = gradient.accumulate(
            model,
            own,
            supervised,
            dtype=torch.float32,
            fused=path == "fused",
            scaler=scaler,
            all_reduce=group.all_reduce,
        )
        return loss.item()

    def work(group: Group) -> None:
        for _ in range(steps):
            accumulate(group)

    learning = [p for p in model.parameters() if p.requires_grad]
    with distributed.forked(workers, learning, work) as forks:
        for _ in range(steps):
            loss = accumulate(forks if workers > 1 else among)
    return loss, gradients(model)


def of_steps(among: Group, where: torch.device, *each: tuple) -> list[tuple[float, Gradients]]:
    """Several in one start of the processes, which costs more than all of them."""
    return [of_step(among, where, *arguments) for arguments in each]


def gradients(model: torch.nn.Module) -> Gradients:
    named = model.named_parameters()
    return {n: p.grad.clone().numpy() for n, p in named if p.grad is not None}
