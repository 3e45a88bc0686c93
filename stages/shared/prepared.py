"""What `prepare` wrote, read back: the rows and the format they are rendered in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from stages.shared.packing import Example

SCHEMA_VERSION = 1


class Format(BaseModel):
    """`data/prepared/format.json`: how conversations were rendered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    template: str
    chat_template: str  # Jinja, for the merged model
    eos_token: str  # what ends a reply; the merged model's end token
    stop_ids: list[int]  # tokens that end a generated reply


def read_format(path: Path) -> Format:
    """Read `format.json`."""
    return Format.model_validate(json.loads(path.read_text(encoding="utf-8")))


def read_examples(path: Path) -> list[Example]:
    """The tokens and masks of all conversations of a split."""
    table = pq.read_table(path, columns=["input_ids", "loss_mask"])
    return [
        Example(np.asarray(ids.values, dtype=np.int64), np.asarray(mask.values, dtype=bool), row)
        for row, (ids, mask) in enumerate(zip(table["input_ids"], table["loss_mask"], strict=True))
    ]


def read_columns(path: Path, *columns: str) -> list[dict[str, Any]]:
    """Some columns of a split, a dictionary a conversation."""
    return pq.read_table(path, columns=list(columns)).to_pylist()
