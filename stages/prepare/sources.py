"""Find the user's files, and read them row by row, never a whole one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    """A file of data/raw, and the name that the user knows it by."""

    split: Split
    path: Path
    name: str

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
    names: dict[Split, list[str]] = {}
    for entry in listed:
        names.setdefault(entry["split"], []).append(entry["name"])
    found = {}
    for split, known in names.items():
        [path] = (p for p in folder.glob(f"{split}.*") if p.suffix != ".partial")
        # Rows of joined files are counted in the joined one: that is the name to tell.
        found[split] = Source(split, path, known[0] if len(known) == 1 else str(path))
    return found
