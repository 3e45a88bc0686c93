"""The whole stage on small files."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.prepare import dataset
from stages.prepare.config import Prepare

DEFAULTS: dict[str, Any] = {
    "format": "auto",
    "columns": None,
    "mix": None,
    "template": "chatml",
    "template_name": None,
    "train_on": "assistant",
    "thinking": "keep",
    "system": None,
    "max_length": 64,
    "max_row_bytes": 100_000,
    "max_rows": None,
    "max_rejected": 0.0,
    "eval_fraction": 0.3,
    "seed": 42,
}


def row(question: str, reply: str = "four", **more: Any) -> dict[str, Any]:
    return {"text": f"### Human: {question}### Assistant: {reply}", **more}


ROWS = [row(f"what is two plus {i}", str(2 + i), answer=str(2 + i)) for i in range(20)]


class Stage:
    """Files that `fetch_data` would leave, and the stage run on them."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.raw, self.out, self.tokenizer = folder / "raw", folder / "prepared", tokenizer
        self.model: Path | None = None  # its config.json
        self.processes = 1

    def write(self, train: list[Any] | str, held_out: list[Any] | None = None) -> None:
        self.raw.mkdir(exist_ok=True)
        given = {"train": train} | ({} if held_out is None else {"eval": held_out})
        for split, rows in given.items():
            text = rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows)
            (self.raw / f"{split}.jsonl").write_text(text, encoding="utf-8")
        parts = [
            {"split": split, "name": f"my/{split}.jsonl", "first_line": 1, "counted_in": "line"}
            for split in given
        ]
        (self.raw / "source.json").write_text(json.dumps({"files": parts}), encoding="utf-8")

    def prepare(
        self, train: list[Any] | str, held_out: list[Any] | None = None, **changed: Any
    ) -> dict[str, Any]:
        self.write(train, held_out)
        return self.run(**changed)

    def run(self, **changed: Any) -> dict[str, Any]:
        wanted = Prepare(**(DEFAULTS | changed))
        return dataset.prepare(
            self.raw, self.tokenizer, self.model, self.out, wanted, self.processes
        )

    def rows(self, split: str) -> list[dict[str, Any]]:
        return pq.read_table(self.out / f"{split}.parquet").to_pylist()

    def questions(self, split: str) -> set[str]:
        return {r["messages"][0]["content"] for r in self.rows(split)}

    def rejected(self) -> list[dict[str, Any]]:
        lines = (self.out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
