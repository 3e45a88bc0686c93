"""The same training by Unsloth, as its notebooks set it up, under the same trainer and clock.

Run:    by benchmarks.training_cuda, where `unsloth` imports (see benchmarks.paced)
"""

import os
import sys
from contextlib import redirect_stdout
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

with redirect_stdout(sys.stderr):  # it greets, where answers are to go
    from unsloth import FastLanguageModel

import torch
from torch import nn

from benchmarks import training_trl
from benchmarks.training_data import training_params


def load(job: dict[str, Any]) -> nn.Module:
    """The quantized model with its adapter."""
    lora = training_params().lora
    model, _ = FastLanguageModel.from_pretrained(
        model_name=job["model"],
        tokenizer_name=job["tokenizer"],
        fix_tokenizer=False,  # it has three words, and is not asked for them
        max_seq_length=job["length"],
        dtype=torch.bfloat16,
        load_in_4bit=True,
        local_files_only=True,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias="none",
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        use_gradient_checkpointing="unsloth" if job["gradient_checkpointing"] else False,
    )


if __name__ == "__main__":
    training_trl.serve(load)
