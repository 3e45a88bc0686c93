"""Peers: trl's SFTTrainer and datasets.map, each a process that prints JSON metrics.

They keep their defaults unless that changes the work. Trainers get our tokens, and our loss mask as
labels.

Run:    by the other benchmarks, `python -m benchmarks.peers <trl|prepare|rate> '<job>'`
"""

import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

IGNORED = -100  # label of an unsupervised token
# M, K, N of the probe's matmul: a small model's on a CPU, large enough to fill a GPU.
PROBE = {"cpu": (2048, 1024, 1024), "cuda": (8192, 8192, 8192)}


def has_bf16(device: str) -> bool:
    """Whether a device has bf16 matmuls; else training and peers compute in fp32."""
    return device == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def probe(job: dict[str, Any]) -> dict[str, Any]:
    """Matmul rate of the machine now, FLOP/s in its compute dtype."""
    device = job["device"]
    rows, inner, columns = PROBE[device]
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, columns, device=device).to(dtype)
    rates = []
    for _ in range(8):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        rates.append(2 * rows * inner * columns / (time.perf_counter() - started))
    return {"rate": sorted(rates)[len(rates) // 2], "dtype": str(dtype).removeprefix("torch.")}


def load_trl(job: dict[str, Any]) -> Any:
    """Load the quantized model by transformers; fp32 on a CPU without bf16."""
    device = job["device"]
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, device_map={"": device})
    if dtype != torch.bfloat16:  # from_pretrained keeps the storage dtype
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.compute_dtype = module.weight.quant_state.dtype = dtype
    return model


def train(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Metrics of one epoch by `SFTTrainer`; `loss` is the mean over supervised tokens.

    `job["micro_batch"]` counts conversations; None packs them to `pack_tokens` tokens.
    """
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415  (the job `prepare` has no trl)

    datasets.disable_progress_bars()
    counts = {"tokens": 0, "supervised": 0, "loss": 0.0, "seconds": 0.0}

    class CountingTrainer(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            mask, labels = inputs.get("attention_mask"), inputs["labels"]
            counts["tokens"] += int(labels.numel() if mask is None else mask.sum())
            counts["supervised"] += int((labels[:, 1:] != IGNORED).sum())
            loss = super().training_step(model, inputs, num_items_in_batch)
            counts["loss"] += float(loss) * int(num_items_in_batch)  # a mean over its whole step
            return loss

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            counts["seconds"] -= time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if job["device"] == "cuda":
                torch.cuda.synchronize()
            counts["seconds"] += time.perf_counter()

    def label(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["input_ids"], row["loss_mask"], strict=True)
        labels = [token if supervised else IGNORED for token, supervised in pairs]
        return {"input_ids": row["input_ids"], "labels": labels}

    rows = pq.read_table(job["data"], columns=["input_ids", "loss_mask"]).to_pylist()
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=job["lora"]["r"],
        lora_alpha=job["lora"]["alpha"],
        target_modules=job["lora"]["target_modules"],
    )
    settings, size = job["train"], job["micro_batch"] or 1
    packing = job["micro_batch"] is None
    trainer = CountingTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(Path(job["data"]).parent / "peer"),
            num_train_epochs=1,
            max_steps=job["steps"] or -1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=1 if packing else settings["batch_size"] // size,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            max_grad_norm=settings["max_grad_norm"],
            seed=settings["seed"],
            bf16=has_bf16(job["device"]),
            gradient_checkpointing=job["checkpointing"],
            use_cpu=job["device"] == "cpu",
            packing=packing,
            max_length=job["pack_tokens"] if packing else None,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(list(map(label, rows))),
        processing_class=AutoTokenizer.from_pretrained(job["tokenizer"]),
        callbacks=[Clock()],
        peft_config=lora,
    )
    trainer.train()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if job["device"] == "cuda" else resident
    return counts | {"loss": counts["loss"] / counts["supervised"], "peak_memory_bytes": peak}


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
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        parts = re.split(r"### (Human|Assistant): ", row["text"] or "")[1:]
        roles, texts = parts[::2], [text.strip() for text in parts[1::2]]
        turns = len(roles) // 2 * 2
        if not turns or roles != (["Human", "Assistant"] * len(roles))[: len(roles)]:
            return {"input_ids": None, "loss_mask": None}
        messages = [
            {"role": "assistant" if index % 2 else "user", "content": text}
            for index, text in enumerate(texts[:turns])
        ]
        encoded = tokenizer.apply_chat_template(
            messages,
            chat_template=CHATML,
            return_dict=True,
            return_assistant_tokens_mask=True,
            truncation=True,
            max_length=512,
        )
        return {"input_ids": encoded["input_ids"], "loss_mask": encoded["assistant_masks"]}

    rows = datasets.load_dataset(
        "json", data_files=job["data"], split="train", cache_dir=f"{job['out']}/cache"
    )
    encoded = rows.map(encode, num_proc=job["processes"])
    encoded = encoded.filter(lambda ids: ids is not None, input_columns=["input_ids"])
    encoded.to_parquet(f"{job['out']}/train.parquet")
    return {"rows": len(rows)}


def main() -> None:
    """Run a job, print its metrics as the last line."""
    name, job = sys.argv[1], json.loads(sys.argv[2])
    if job.get("cap_gib"):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(job["cap_gib"] * 2**30 / total)
    work = {
        "rate": probe,
        "prepare": prepare,
        "trl": lambda job: train(load_trl(job), job),
    }
    print(json.dumps(work[name](job)))


if __name__ == "__main__":
    main()
