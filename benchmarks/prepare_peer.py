"""The same rows with `datasets.map` and a Python function a row, as most recipes prepare data.

Prints one line of JSON. The columns are those of `prepare`. Still it does less: no search for
duplicates and leaks, no split, no guard against forged turns, no cut between turns, no list of
what was rejected.

Run:    python -m benchmarks.prepare_peer RAW_FOLDER TOKENIZER_FOLDER EMPTY_FOLDER [PROCESSES]
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks import measured
from stages.prepare import guanaco
from stages.shared.chat.conversation import (
    RejectedRow,
    conversation_id,
    drop_unanswered,
    language_of,
    problem_with,
)

# What marks a reply for `return_assistant_tokens_mask`, and else ChatML as `prepare` renders it.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
COLUMNS = (
    "conversation_id",
    "messages",
    "text",
    "input_ids",
    "loss_mask",
    "text_bytes",
    "language",
)


def tokenize(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All columns of one row but its answer; nothing of one that cannot be trained on."""
    try:
        messages = drop_unanswered(guanaco.parse(row["text"] or ""))
    except RejectedRow:
        messages = []
    if problem_with(messages) is not None:
        return dict.fromkeys(COLUMNS)
    found = tokenizer.apply_chat_template(
        messages,
        chat_template=CHATML,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        truncation=True,
        max_length=512,
    )
    return {
        "conversation_id": conversation_id(messages),
        "messages": messages,
        "text": tokenizer.apply_chat_template(messages, chat_template=CHATML, tokenize=False),
        "input_ids": found["input_ids"],
        "loss_mask": found["assistant_masks"],
        "text_bytes": sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant"),
        "language": row["language"] or language_of(messages),
    }


def prepare(raw: Path, tokenizer_folder: Path, folder: Path, processes: int) -> dict[str, int]:
    """Read, map, drop, write."""
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rows = datasets.load_dataset(
        "json", data_files=str(raw / "train.jsonl"), split="train", cache_dir=str(folder)
    )
    count = None if processes == 1 else processes
    mapped = rows.map(tokenize, fn_kwargs={"tokenizer": tokenizer}, num_proc=count)
    mapped = mapped.filter(lambda ids: ids is not None, input_columns=["input_ids"], num_proc=count)
    mapped.to_parquet(folder / "train.parquet")
    return {"rows": len(rows)}


if __name__ == "__main__":
    raw, tokenizer, folder = map(Path, sys.argv[1:4])
    processes = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    measured.tell(lambda: prepare(raw, tokenizer, folder, processes))
