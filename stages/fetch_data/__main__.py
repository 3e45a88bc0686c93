"""Raw conversations as JSON Lines, from a file, a folder or a data set on the hub.

Reads:  data.path (a file or a folder), or data.repo at data.revision
Writes: data/raw/train.jsonl; data/raw/eval.jsonl if the source has a held-out split;
        data/raw/source.json, the source files with their SHA-256
Run:    python -m stages.fetch_data
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages.fetch_data import formats, sources
from stages.fetch_data.config import Data, Params
from stages.fetch_data.sources import Part
from stages.shared.core import files, params
from stages.shared.core.command import run
from stages.shared.hub.repository import download_folder, pin

RAW = Path("data/raw")


def fetch(data: Data, raw: Path, max_row_bytes: int) -> None:
    """Write `raw/<split>.jsonl` and `raw/source.json`."""
    if data.source == "hub":
        repository = pin("dataset", data.repo, data.revision)
        with download_folder(repository) as folder:
            parts = sources.fetch(repository, data.config, folder)
            written = write(parts, raw, max_row_bytes)
        pinned = {"repo": data.repo, "revision": data.revision, "config": data.config}
    else:
        with TemporaryDirectory(dir=raw) as scratch:
            parts = sources.find(Path(data.path), data.config)
            written = write(parts, raw, max_row_bytes, Path(scratch, "copy"))
        pinned = {}
    files.write_json(raw / "source.json", {"source": data.source, **pinned, "files": written})


def write(
    parts: list[Part], raw: Path, max_row_bytes: int, copy: Path | None = None
) -> list[dict[str, Any]]:
    """Write all rows; the entries of `source.json`.

    A local file may change meanwhile, so it is hashed and read from `copy`.
    """
    files.require_space(raw, sum(part.path.stat().st_size for part in parts), "data/raw")
    written: list[dict[str, Any]] = []
    lines = {"train": 0, "eval": 0}
    for part in parts:
        path = shutil.copyfile(part.path, copy) if copy else part.path
        unit, rows = formats.read(part.path, part.name, path, max_row_bytes)
        entry: dict[str, Any] = {"split": part.split, "name": part.name}
        entry |= {} if part.source is None else {"source": part.source}
        entry |= {"sha256": files.sha256(path), "bytes": path.stat().st_size}
        written.append({**entry, "first_line": lines[part.split] + 1, "counted_in": unit})
        last = [other for other in parts if other.split == part.split][-1]
        with (raw / f"{part.split}.jsonl").open("ab") as out:
            for row in rows:
                lines[part.split] += 1
                ended = row.endswith(b"\n") or part is last
                out.write(row if ended else row + b"\n")
    return written


def main() -> None:
    """Read parameters, fetch."""
    settings = params.load(Params, "fetch_data")
    with files.whole_folder(RAW) as raw:
        fetch(settings.data, raw, settings.prepare.max_row_bytes)


if __name__ == "__main__":
    run(main)
