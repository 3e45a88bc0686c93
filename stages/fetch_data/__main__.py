"""Fetch raw conversations as JSON Lines: from a file, a folder or a data set of the hub.

Reads:  data.path (a file or a folder), or data.repo at data.revision
Writes: data/raw/train.jsonl, data/raw/eval.jsonl where the source has such a split, and
        data/raw/source.json: the files they were made of, with their SHA-256
Run:    python -m stages.fetch_data
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from stages.fetch_data import formats, sources
from stages.fetch_data.sources import Part
from stages.shared.core import files, params
from stages.shared.core.errors import run
from stages.shared.hub.download import download_folder
from stages.shared.hub.repository import pin

RAW = Path("data/raw")


class Data(params.Section):
    """Where the conversations come from."""

    source: Literal["file", "hub"]
    path: str
    repo: str
    config: str | None
    revision: str | None


class Params(params.Section):
    """What dvc.yaml declares for this stage."""

    data: Data


def fetch(data: Data, raw: Path) -> None:
    """Write one file a split into `raw`, and `source.json`.

    Raises:
        UserError: the source is missing, unreadable, empty, truncated or ambiguous.
    """
    if data.source == "hub":
        repository = pin("dataset", data.repo, data.revision)
        with download_folder(repository) as folder:
            written = write(sources.fetch(repository, data.config, folder), raw)
        pinned = {"repo": data.repo, "revision": data.revision, "config": data.config}
    else:
        with TemporaryDirectory(dir=raw) as scratch:
            written = write(sources.find(Path(data.path), data.config), raw, Path(scratch) / "copy")
        pinned = {}
    files.write_json(raw / "source.json", {"source": data.source, **pinned, "files": written})


def write(parts: list[Part], raw: Path, copy: Path | None = None) -> list[dict[str, Any]]:
    """Write the rows of all parts.

    Args:
        parts: the files of the splits.
        raw: where `<split>.jsonl` is written.
        copy: where a file of the user's is copied to before it is hashed and read, since it may
            change meanwhile; None: read where it lies.

    Returns:
        Of each part what it is, where its rows begin in `<split>.jsonl`, and whether they are the
        lines of the file or its rows.
    """
    files.require_space(raw, sum(part.path.stat().st_size for part in parts), "data/raw")
    written: list[dict[str, Any]] = []
    lines = {"train": 0, "eval": 0}
    for part in parts:
        path = shutil.copyfile(part.path, copy) if copy else part.path
        unit, rows = formats.read(part.path, part.name, path)
        written.append(
            {
                "split": part.split,
                "name": part.name,
                "sha256": files.sha256(path),
                "bytes": path.stat().st_size,
                "first_line": lines[part.split] + 1,
                "counted_in": unit,
            }
        )
        with (raw / f"{part.split}.jsonl").open("ab") as out:
            row = b"\n"
            for row in rows:
                out.write(row)
                lines[part.split] += 1
            if not row.endswith(b"\n") and part is not _last(parts, part.split):
                out.write(b"\n")
    return written


def _last(parts: list[Part], split: str) -> Part:
    return [part for part in parts if part.split == split][-1]


def main() -> None:
    """Fetch the data that params.yaml names."""
    data = params.load(Params, "fetch_data").data
    with files.whole_folder(RAW) as raw:
        fetch(data, raw)


if __name__ == "__main__":
    run(main)
