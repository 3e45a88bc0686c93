"""Peers: trl's SFTTrainer and datasets.map, each in its own process.

They keep their defaults unless that changes the work. Trainers get our tokens, and our loss mask as
labels.

Run:    by the other benchmarks, `python -m benchmarks.peers <trl|prepare> '<job>'`
"""

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.shared.core import files
from stages.shared.weights.precision import compute_dtype

IGNORED = -100  # label of an unsupervised token


def load_trl(device: str, dtype: torch.dtype) -> Any:
    """Load the quantized model by transformers; matmuls in `dtype`, not in the storage dtype."""
    model = AutoModelForCausalLM.from_pretrained(
        "models/quantized", dtype=dtype, device_map={"": device}
    )
    if dtype != torch.bfloat16:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.compute_dtype = module.weight.quant_state.dtype = dtype
    return model


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Metrics of one epoch by `SFTTrainer`; `loss` is the mean over supervised tokens.

    `job["conversations"]` are computed at once; None packs them to `pack_tokens` tokens.
    """
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415  (the job `prepare` has no trl)

    device, size, packing = job["device"], job["conversations"] or 1, not job["conversations"]
    settings, lora = job["params"]["train"], job["params"]["lora"]
    dtype = compute_dtype(torch.bfloat16, device)
    if job["cap_gib"]:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(job["cap_gib"] * 2**30 / total)
    counts = {"tokens": 0, "supervised": 0, "loss": 0.0}

    class CountingTrainer(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            mask, labels = inputs.get("attention_mask"), inputs["labels"]
            counts["tokens"] += int(labels.numel() if mask is None else mask.sum())
            counts["supervised"] += int((labels[:, 1:] != IGNORED).sum())
            loss = super().training_step(model, inputs, num_items_in_batch)
            counts["loss"] += float(loss) * int(num_items_in_batch)  # a mean over its whole step
            return loss

    def label(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["input_ids"], row["loss_mask"], strict=True)
        labels = [token if supervised else IGNORED for token, supervised in pairs]
        return {"input_ids": row["input_ids"], "labels": labels}

    columns = ["input_ids", "loss_mask"]
    rows = pq.read_table("data/prepared/train.parquet", columns=columns).to_pylist()
    trainer = CountingTrainer(
        model=load_trl(device, dtype),
        args=SFTConfig(
            output_dir="peer",
            max_steps=job["steps"],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=1 if packing else settings["batch_size"] // size,
            learning_rate=settings["learning_rate"],
            max_grad_norm=settings["max_grad_norm"],
            bf16=dtype == torch.bfloat16,
            gradient_checkpointing=job["checkpointed"],
            use_cpu=device == "cpu",
            packing=packing,
            max_length=job["pack_tokens"] if packing else None,
            save_strategy="no",
            logging_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_list(list(map(label, rows))),
        processing_class=AutoTokenizer.from_pretrained("models/tokenizer"),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=lora["r"],
            lora_alpha=lora["alpha"],
            target_modules=lora["target_modules"],
        ),
    )
    seconds = trainer.train().metrics["train_runtime"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    counts |= {"tokens_per_second": counts["tokens"] / seconds, "peak_memory_bytes": peak}
    return counts | {"loss": counts["loss"] / counts["supervised"]}


# ChatML as `prepare` renders it, with the marks of `return_assistant_tokens_mask`.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens and masks by `datasets.map` with a function per row, as in most recipes.

    Less work than `prepare`: no duplicates or leaks found, no split, no guard against forged turns,
    no truncation between turns, no list of rejected rows.
    """
    tokenizer = AutoTokenizer.from_pretrained("models/tokenizer")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        parts = re.split(r"### (Human|Assistant): ", row["text"] or "")[1:]
        roles, texts = parts[::2], [text.strip() for text in parts[1::2]]
        turns = len(roles) // 2 * 2
        if not turns or roles != (["Human", "Assistant"] * len(roles))[: len(roles)]:
            return {"input_ids": None, "loss_mask": None}
        pairs = zip(["user", "assistant"] * turns, texts[:turns], strict=False)
        messages = [{"role": role, "content": text} for role, text in pairs]
        encoded = tokenizer.apply_chat_template(
            messages,
            chat_template=CHATML,
            return_dict=True,
            return_assistant_tokens_mask=True,
            truncation=True,
            max_length=512,
        )
        return {"input_ids": encoded["input_ids"], "loss_mask": encoded["assistant_masks"]}

    source, cache = job["data"], f"{job['out']}/cache"
    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache)
    encoded = rows.map(encode, num_proc=job["processes"])
    encoded = encoded.filter(lambda ids: ids is not None, input_columns=["input_ids"])
    encoded.to_parquet(f"{job['out']}/train.parquet")
    return {"rows": len(rows)}


if __name__ == "__main__":
    peer = {"trl": train, "prepare": prepare}[sys.argv[1]]
    files.write_json(Path("peer.json"), peer(json.loads(sys.argv[2])))
