"""The files of a data set on the hub that hold the splits.

A data set says by the names of its files what they are. This reads the two layouts that are
common, `<split>` somewhere in a name and shards `<name>-00000-of-00002`, and refuses to guess
where more than one table could be meant.
"""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from stages.fetch_data.formats import EXTENSIONS, SUPPORTED
from stages.fetch_data.part import EVAL_NAMES, SYNONYMS, Part, Split
from stages.shared.core.errors import UserError
from stages.shared.download import download
from stages.shared.hub import Repository, list_files

_SHARD = re.compile(r"(?P<table>.+)-\d{5}-of-(?P<shards>\d{5})(-[0-9a-f]+)?")
_WORDS = SYNONYMS | {name: name for name in ("train", *EVAL_NAMES)}
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")


def fetch(repository: Repository, folder: Path) -> list[Part]:
    """Download the files of the splits into `folder`.

    Raises:
        UserError: as `choose`, `hub.list_files` and `download` do.
    """
    listed = {file.path: file for file in list_files(repository)}
    chosen = choose(listed, repository.url)
    names = [name for shards in chosen.values() for name in shards]
    paths = download(repository, [listed[name] for name in names], folder)
    return [Part(split, paths[name], name) for split in chosen for name in chosen[split]]


def choose(names: Iterable[str], where: str) -> dict[Split, list[str]]:
    """Which files hold the training rows and, where there are any, the held-out ones.

    Args:
        names: the paths of all files of a data set.
        where: what a message calls the data set.

    Returns:
        The shards of each split, in order.

    Raises:
        UserError: no file is usable, a shard is missing, or several tables could be meant.
    """
    tables: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() in EXTENSIONS and path.name not in _DESCRIPTIONS:
            shard = _SHARD.fullmatch(str(path.with_suffix("")))
            table = (shard["table"] if shard else str(path.with_suffix(""))) + path.suffix
            tables.setdefault(_split_of(table), {}).setdefault(table, []).append(name)
    if not tables:
        raise UserError(
            f"{where}: has no file that can be read; expected {SUPPORTED}; "
            "convert it and set data.source to file"
        )
    if "train" not in tables and set(tables) == {""}:
        tables["train"] = tables.pop("")  # a data set of one file has no need to name its split
    if "train" not in tables:
        found = ", ".join(table for of_split in tables.values() for table in of_split)
        raise UserError(
            f"{where}: has no file that is named train, but {found:.200}; "
            "download the one you want and set data.source to file"
        )
    chosen: dict[Split, list[str]] = {"train": _only_table(tables["train"], "train", where)}
    held_out = next((name for name in EVAL_NAMES if name in tables), None)
    if held_out:
        chosen["eval"] = _only_table(tables[held_out], held_out, where)
    return chosen


def _split_of(table: str) -> str:
    """`train`, a name in `EVAL_NAMES`, or nothing; a file's name counts before its folders'."""
    for part in reversed(PurePosixPath(table).with_suffix("").parts):
        words = [_WORDS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _WORDS]
        if words:
            return words[-1]
    return ""


def _only_table(tables: dict[str, list[str]], split: str, where: str) -> list[str]:
    plain = [table for table in tables if PurePosixPath(table).stem.lower() == split]
    candidates = plain if len(plain) == 1 else list(tables)
    if len(candidates) > 1:
        raise UserError(
            f"{where}: several tables could be the {split} split: {', '.join(candidates):.200}; "
            "expected one; download the one you want and set data.source to file"
        )
    names = tables[candidates[0]]
    shard = _SHARD.fullmatch(str(PurePosixPath(names[0]).with_suffix("")))
    if shard and len(names) != int(shard["shards"]):
        raise UserError(
            f"{where}: has {len(names)} of the {int(shard['shards'])} shards of {candidates[0]}; "
            "expected all; choose another revision"
        )
    return names
