"""Fetch raw conversations: a file, a folder or a data set of the hub, as it is.

Reads:  data.path (a file, or a folder with train.* and eval.*), or data.repo at data.revision
Writes: data/raw/train.<ext>, data/raw/eval.<ext> where the source has such a split, and
        data/raw/source.json: where each came from, with its SHA-256
Run:    python -m stages.fetch_data
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from stages.fetch_data import formats, join, local, remote
from stages.fetch_data.part import Part
from stages.shared import hub
from stages.shared.core import files, params
from stages.shared.core.errors import run

RAW = Path("data/raw")


class Data(params.Section):
    """Where the conversations come from."""

    source: Literal["file", "hub"]
    path: str
    repo: str
    revision: str | None


class Params(params.Section):
    """What dvc.yaml declares for this stage."""

    data: Data


def find(data: Data, scratch: Path) -> list[Part]:
    """The files of each split: on the user's disk, or downloaded into `scratch`."""
    if data.source == "file":
        return local.find(Path(data.path))
    repository = hub.repository(
        "dataset",
        data.repo,
        data.revision,
        name_parameter="data.repo",
        revision_parameter="data.revision",
    )
    return remote.fetch(repository, scratch)


def fetch(data: Data, raw: Path) -> None:
    """Write one file a split into `raw`, and `source.json`.

    A single file is copied byte for byte, so that a line number in a later message is that of the
    user's file; the shards of a split become one file. A copy and never a link: DVC makes what it
    tracks read-only, and the file is the user's.

    Raises:
        UserError: the source is missing, unreadable, empty, truncated or ambiguous.
    """
    with TemporaryDirectory(dir=raw) as scratch:
        parts = find(data, Path(scratch))
        files.require_space(raw, sum(p.path.stat().st_size for p in parts), "data/raw")
        for part in parts:
            formats.check(part.path, part.name)
        for split in dict.fromkeys(part.split for part in parts):
            of_split = [part for part in parts if part.split == split]
            join.join(of_split, raw / f"{split}{of_split[0].extension}")
        files.write_json(raw / "source.json", describe(data, parts))


def describe(data: Data, parts: list[Part]) -> dict[str, Any]:
    """Where the splits came from; no time and nothing else that differs from run to run."""
    pinned = {"repo": data.repo, "revision": data.revision} if data.source == "hub" else {}
    return {
        "source": data.source,
        **pinned,
        "files": [
            {
                "split": part.split,
                "name": part.name,
                "sha256": files.sha256(part.path),
                "bytes": part.path.stat().st_size,
            }
            for part in parts
        ],
    }


def main() -> None:
    """Fetch the data that params.yaml names."""
    data = params.load(Params, "fetch_data").data
    with files.whole_folder(RAW) as raw:
        fetch(data, raw)


if __name__ == "__main__":
    run(main)
