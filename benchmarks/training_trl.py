"""The same training by `trl`'s `SFTTrainer`, a step at a time; `trl` and `datasets` are needed.

Its own defaults stand wherever the work stays the same: adapters in bf16, fused AdamW, its loss and
its collators. It gets tokens, and our mask as labels; that it learns from as many tokens as we do
is checked at every step. Gradient checkpointing, its default, is off, as ours is. A step is timed
from its beginning to its end: collating the batch before it is left out.

Run:    by benchmarks.training, which tells it when (see benchmarks.paced)
"""

import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks import matrix_rate, resident
from benchmarks.paced import Channel
from benchmarks.training_data import training_params
from stages.shared.examples import Example, read_examples
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


class Paced(TrainerCallback):
    """Lets the trainer take a step when the driver asks for one, and answers with its figures."""

    def __init__(self, channel: Channel, trainer: CountingTrainer, supervised: list[int]) -> None:
        self.channel, self.trainer, self.supervised = channel, trainer, supervised
        self.rate = self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait, find the matrix rate, start the clock."""
        self.channel.hear()
        self.trainer.counted = Counter()
        self.rate = matrix_rate.probe(args.device)
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock, see that the work was the same, answer."""
        seconds = time.perf_counter() - self.started
        found, expected = self.trainer.counted, self.supervised[state.global_step - 1]
        if found["supervised_tokens"] != expected:
            raise AssertionError(
                f"step {state.global_step}: {found['supervised_tokens']} supervised tokens, "
                f"ours has {expected}"
            )
        self.channel.tell(
            {
                "seconds": seconds,
                "matrix_rate": self.rate,
                "peak_bytes": resident.peak_bytes(),
                **found,
            }
        )


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
        bf16=True,
        gradient_checkpointing=False,
        use_cpu=True,
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
    return CountingTrainer(
        model=model,
        args=config(settings, job, job["steps"], folder),
        train_dataset=dataset_of(drawn),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
        ),
    )


def main() -> None:
    """Load, then train, a step whenever one is asked for."""
    channel = Channel()
    job = channel.hear()
    disable_progress_bars()
    settings = training_params(train__batch_size=job["batch_size"])
    examples = read_examples(Path(job["data"]) / "train.parquet")
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, settings, job, examples, folder)
        steps = rows_of_steps(trainer, examples)
        supervised = [sum(examples[row].supervised_tokens for row in step) for step in steps]
        trainer.add_callback(Paced(channel, trainer, supervised))
        resident.forget_peak()
        channel.tell({"before_bytes": resident.resident_bytes(), "steps": steps})
        trainer.train()


if __name__ == "__main__":
    main()
