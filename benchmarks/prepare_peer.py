"""The same rows with `datasets.map` and a Python function a row, as most recipes prepare data.

Prints one line of JSON. It does less than `prepare` does: no search for duplicates and leaks, no
split, no rendered text beside the tokens, no count of bytes, no guard against forged turns.

Run:    python -m benchmarks.prepare_peer RAW_FOLDER TOKENIZER_FOLDER EMPTY_FOLDER
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
from stages.shared.conversation import Unusable, drop_unanswered, problem_with

# What marks a reply for `return_assistant_tokens_mask`, and else ChatML as `prepare` renders it.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def tokenize(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Tokens and mask of one row; nothing of one that cannot be trained on."""
    try:
        messages = drop_unanswered(guanaco.parse(row["text"] or ""))
    except Unusable:
        messages = []
    if problem_with(messages) is not None:
        return {"messages": None, "input_ids": None, "loss_mask": None}
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
        "messages": messages,
        "input_ids": found["input_ids"],
        "loss_mask": found["assistant_masks"],
    }


def prepare(raw: Path, tokenizer_folder: Path, folder: Path) -> dict[str, int]:
    """Read, map, drop, write."""
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rows = datasets.load_dataset(
        "json", data_files=str(raw / "train.jsonl"), split="train", cache_dir=str(folder)
    )
    mapped = rows.map(tokenize, fn_kwargs={"tokenizer": tokenizer}, remove_columns=["text"])
    mapped = mapped.filter(lambda ids: ids is not None, input_columns=["input_ids"])
    mapped.to_parquet(folder / "train.parquet")
    return {"rows": len(rows)}


if __name__ == "__main__":
    measured.tell(lambda: prepare(*map(Path, sys.argv[1:4])))
