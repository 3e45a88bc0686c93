"""One file of a split, wherever it comes from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "eval"]

# A source's name for the rows that are held out. Where it has several, the first of these counts.
EVAL_NAMES = ("eval", "validation", "test")
# What else a split is called.
SYNONYMS = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}
SYNONYMS |= {"evaluation": "eval"}


@dataclass(frozen=True)
class Part:
    """A file of a split; several of them, in order, are its shards.

    Attributes:
        split: which split its rows belong to.
        path: where it lies.
        name: what the user calls it: a path of theirs, or a file of the repository on the hub.
    """

    split: Split
    path: Path
    name: str

    @property
    def extension(self) -> str:
        """In lower case, with its dot."""
        return Path(self.name).suffix.lower()
