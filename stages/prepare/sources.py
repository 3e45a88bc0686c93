"""Find the user's files, and read them row by row, never a whole one."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.prepare.json_rows import read_json, read_jsonl
from stages.prepare.rows import Row
from stages.prepare.splitting import Split
from stages.prepare.table_rows import read_csv, read_parquet
from stages.shared.core import files
from stages.shared.core.errors import UserError

_READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


@dataclass(frozen=True)
class Source:
    """A file of data/raw, and the files of the user's that it was made of.

    Attributes:
        split: which split its rows belong to.
        path: where it lies.
        name: what a message calls the whole of it.
        parts: of each file its name, the line here that it begins at, and how its rows count.
    """

    split: Split
    path: Path
    name: str
    parts: list[dict[str, Any]] = field(default_factory=list)

    def place(self, line: int) -> tuple[str, str, int]:
        """The user's file that a line comes from, "line" or "row", and its number there."""
        parts = self.parts or [{"name": self.name}]
        part = [part for part in parts if part.get("first_line", 1) <= line][-1]
        first = part.get("first_line", 1)
        return part["name"], part.get("counted_in", "line"), line - first + 1

    def rows(self) -> Iterator[Row]:
        """Read the file.

        Raises:
            UserError: it is not what its name says, as a whole; a single bad row has a `problem`.
        """
        try:
            yield from _READERS[self.path.suffix](self.path, self.name)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.name}: not UTF-8 ({error.reason}); expected UTF-8 text; convert the file"
            ) from None


def find(folder: Path) -> dict[Split, Source]:
    """The files that `fetch_data` wrote, by split: `train`, and `eval` where there is one.

    Raises:
        UserError: the folder is not as `fetch_data` leaves it.
    """
    try:
        listed = files.read_json(folder / "source.json")["files"]
    except FileNotFoundError:
        raise UserError(f"{folder}: no source.json in it; run `dvc repro fetch_data`") from None
    parts: dict[Split, list[dict[str, Any]]] = {}
    for entry in listed:
        parts.setdefault(entry["split"], []).append(entry)
    found = {}
    for split, known in parts.items():
        [path] = (p for p in folder.glob(f"{split}.*") if p.suffix != ".partial")
        name = known[0]["name"] if len(known) == 1 else str(path)
        found[split] = Source(split, path, name, known)
    return found
