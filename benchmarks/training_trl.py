"""The same training by `trl`'s `SFTTrainer`, a step at a time; `trl` and `datasets` are needed.

That it learns from as many tokens as we do is checked at every step. A step is timed from its
beginning to its end: collating the batch before it is left out.

Run:    by benchmarks.training, which tells it when (see benchmarks.paced)
"""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch
from bitsandbytes.nn import Linear4bit
from datasets import disable_progress_bars
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks import matrix_rate, resident
from benchmarks.paced import Channel
from benchmarks.training_data import training_params
from benchmarks.trl_trainer import CountingTrainer, make_trainer, rows_of_steps
from stages.shared.examples import read_examples
from stages.shared.precision import computed_in


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
        matrix_rate.wait(args.device)
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
                "peak_bytes": resident.peak_bytes(args.device),
                **found,
            }
        )


def load(job: dict[str, Any]) -> nn.Module:
    """The quantized model, as transformers loads it; in fp32 on a CPU that has no bf16 products."""
    device = job.get("device", "cpu")
    dtype = computed_in(torch.bfloat16, device)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, device_map={"": device})
    if dtype != torch.bfloat16:  # of a quantized model, the rest comes as it is stored
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.compute_dtype = module.weight.quant_state.dtype = dtype
    return model


def serve(load: Callable[[dict[str, Any]], nn.Module]) -> None:
    """Load, then train, a step whenever one is asked for.

    Args:
        load: from the job, the model; with an adapter, or to be given one.
    """
    channel = Channel()
    job = channel.hear()
    resident.cap(job.get("cap_gib"))
    disable_progress_bars()
    settings = training_params(train__batch_size=job["batch_size"])
    examples = read_examples(Path(job["data"]) / "train.parquet")
    model, tokenizer = load(job), AutoTokenizer.from_pretrained(job["tokenizer"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, settings, job, examples, folder)
        steps = rows_of_steps(trainer, examples)
        supervised = [sum(examples[row].supervised_tokens for row in step) for step in steps]
        trainer.add_callback(Paced(channel, trainer, supervised))
        resident.forget_peak(trainer.args.device)
        channel.tell({"before_bytes": resident.now_bytes(trainer.args.device), "steps": steps})
        trainer.train()


if __name__ == "__main__":
    serve(load)
