"""`trl`'s `SFTTrainer` on our conversations, counting what it computes on.

Its own defaults stand wherever the work stays the same: adapters in bf16, fused AdamW, its loss and
its collators. It gets tokens, and our mask as labels. Gradient checkpointing, its default, is off
unless a job asks for it.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from trl import SFTConfig, SFTTrainer

from stages.shared.examples import Example
from stages.shared.precision import computed_in
from stages.train.settings import Params
from stages.train.steps import Steps

IGNORED = -100  # the label of a token that is not learnt


class CountingTrainer(SFTTrainer):
    """Counts what goes through the model in a step, and adds up its loss.

    Attributes:
        counted: since it was last cleared.
    """

    counted: Counter[str]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """A micro-batch, forward and backward."""
        computed = inputs["input_ids"].numel()
        mask = inputs.get("attention_mask")
        self.counted["computed_tokens"] += computed
        self.counted["tokens"] += computed if mask is None else int(mask.sum())
        self.counted["supervised_tokens"] += int((inputs["labels"][:, 1:] != IGNORED).sum())
        loss = super().training_step(model, inputs, *args)
        self.counted["loss"] += loss.item()  # already over the supervised tokens of all the step
        return loss


def dataset_of(examples: Sequence[Example]) -> Dataset:
    """Tokens, and labels from our mask."""
    ids = [example.input_ids.tolist() for example in examples]
    masks = [example.loss_mask.tolist() for example in examples]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "labels": [
                [token if learnt else IGNORED for token, learnt in zip(*one, strict=True)]
                for one in zip(ids, masks, strict=True)
            ],
        }
    )


def config(settings: Params, job: dict[str, Any], steps: int, folder: str) -> SFTConfig:
    """The trainer's settings: ours where they name the same thing, else its defaults.

    A packed row holds as many tokens as a step of ours has on average, and is a step.
    """
    packing = job["pack_tokens"] is not None
    size = 1 if packing else job["micro_batch"]
    train = settings.train
    return SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=1 if packing else train.batch_size // size,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        bf16=computed_in(torch.bfloat16, job.get("device", "cpu")) == torch.bfloat16,
        gradient_checkpointing=job.get("gradient_checkpointing", False),
        use_cpu=job.get("device", "cpu") == "cpu",
        packing=packing,
        max_length=job["pack_tokens"],
        shuffle_dataset=packing,  # of rows that were sorted by length to be packed
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def rows_of_steps(trainer: SFTTrainer, examples: Sequence[Example]) -> list[list[int]]:
    """The rows of the split that each of its steps takes, recognised by their tokens."""
    known: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for example in examples:
        known[tuple(example.input_ids.tolist())].append(example.row)
    args = trainer.args
    at_once = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps: list[list[int]] = []
    for index, row in enumerate(trainer.train_dataset):
        if index % at_once == 0:
            steps.append([])
        start, ids = 0, row["input_ids"]
        for length in row.get("seq_lengths", [len(ids)]):
            steps[-1].append(known[tuple(ids[start : start + length])].pop())
            start += length
    return steps


def make_trainer(
    model: nn.Module,
    tokenizer: Any,
    settings: Params,
    job: dict[str, Any],
    examples: Sequence[Example],
    folder: str,
) -> CountingTrainer:
    """The trainer over the conversations that our first `job["steps"]` steps would draw."""
    steps = Steps.of(settings.train, len(examples))
    drawn = [examples[row] for step in range(job["steps"]) for row in steps.drawn(step)]
    lora = settings.lora
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    return CountingTrainer(
        model=model,
        args=config(settings, job, job["steps"], folder),
        train_dataset=dataset_of(drawn),
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else adapter,
    )
