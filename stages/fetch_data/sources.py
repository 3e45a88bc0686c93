"""The files that hold the splits: on the user's disk, or in a data set of the hub.

`datasets` says what a data set is (configurations, splits, shards) from the names of its files and
from its README, for a folder on the disk as for the hub.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from stages.fetch_data.formats import SUPPORTED, is_readable
from stages.shared.core.errors import UserError
from stages.shared.hub.download import download
from stages.shared.hub.repository import Repository

Split = Literal["train", "eval"]

# What the held-out rows may be called; where a source has several, the first of these counts.
_EVAL_NAMES = ("eval", "evaluation", "validation", "valid", "val", "dev", "test", "testing")
_TRAIN_NAMES = ("train", "training")
_SHARD = re.compile(r"(?P<table>.+)-\d{5}-of-(?P<shards>\d{5})(?P<rest>.*)")
_CARD = "README.md"


@dataclass(frozen=True)
class Part:
    """A file of a split; several of them, in order, are its shards.

    Attributes:
        split: which split its rows belong to.
        path: where it lies.
        name: how the user knows it: a path of theirs, or a file of the repository on the hub.
    """

    split: Split
    path: Path
    name: str


def find(path: Path, config: str | None) -> list[Part]:
    """The files of the user's own: one, a folder with train.* and eval.*, or one as on the hub.

    Raises:
        UserError: nothing is there, no split can be made out, or more than one file could be it.
    """
    if path.is_file():
        if not is_readable(path.name):
            raise UserError(f"data.path: cannot read {str(path)!r}. Convert it to {SUPPORTED}.")
        return [Part("train", path, str(path))]
    if not path.is_dir():
        raise UserError(
            f"data.path: {str(path)!r} does not exist. Correct it (`dvc exp run --temp` and "
            "`--queue` need an absolute path)."
        )
    train = _only_file(path, _TRAIN_NAMES)
    if train:
        held_out = next((f for name in _EVAL_NAMES if (f := _only_file(path, (name,)))), None)
        parts = [Part("train", train, str(train))]
        return parts + ([Part("eval", held_out, str(held_out))] if held_out else [])
    names = [f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()]
    card = path / _CARD
    splits = choose(names, card if card.is_file() else None, config, str(path))
    return [Part(s, path / name, str(path / name)) for s, files in splits.items() for name in files]


def _only_file(folder: Path, names: Iterable[str]) -> Path | None:
    found = sorted(
        path
        for path in folder.iterdir()
        if path.name.partition(".")[0].lower() in names
        and is_readable(path.name)
        and path.is_file()
    )
    if len(found) > 1:
        raise UserError(
            f"{folder}: both {found[0].name} and {found[1].name} could be one split. Remove one."
        )
    return found[0] if found else None


def choose(
    names: Iterable[str], card: Path | None, config: str | None, where: str
) -> Mapping[Split, list[str]]:
    """The files of the training rows and, where there are any, of the held-out ones.

    Args:
        names: the paths of all files of a data set, below its folder.
        card: its README.md, which may name configurations.
        config: `data.config`.
        where: what a message calls the data set.

    Returns:
        The shards of each split, in order.

    Raises:
        UserError: no file is readable, a shard is missing, or several tables could be meant.
    """
    splits = _splits(names, card, config, where)
    train = _one_of(splits, _TRAIN_NAMES)
    held_out = next((found for name in _EVAL_NAMES if (found := _one_of(splits, (name,)))), None)
    if train is None and len(splits) == 1 and held_out is None:
        train = next(iter(splits))
    if train is None:
        raise UserError(
            f"{where}: has no one split train, but {', '.join(splits):.60}. Download the files you "
            "want and set data.source to file."
        )
    chosen: dict[Split, list[str]] = {"train": splits[train]}
    if held_out:
        chosen["eval"] = splits[held_out]
    for files in chosen.values():
        _require_all_shards(files, where)
    if both := set(splits[train]) & set(chosen.get("eval", ())):
        raise UserError(f"{where}: {min(both)} is by its name in train and {held_out}. Rename it.")
    return chosen


def _splits(
    names: Iterable[str], card: Path | None, config: str | None, where: str
) -> dict[str, list[str]]:
    """All splits of one configuration, as `datasets` makes them out.

    It looks at names alone, in an empty copy of the folder: nothing is read or asked for twice, and
    a folder `owner/name` of the user's cannot stand in for the one on the hub.
    """
    import datasets  # noqa: PLC0415  (a second that a file of one's own need not pay)

    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "data").resolve()
        for name in names:
            if Path(name).name not in (_CARD, "dataset_infos.json"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
        folder.mkdir(exist_ok=True)
        if card:
            shutil.copyfile(card, folder / _CARD)
        try:
            configs = datasets.get_dataset_config_names(str(folder))
            default = datasets.get_dataset_default_config_name(str(folder))
            if config is not None and config not in configs:
                raise UserError(
                    f"data.config: {where} has no {config!r}. Choose one of "
                    f"{', '.join(configs):.80}."
                )
            if config is None and default is None:
                raise UserError(
                    f"data.config: is null, and {where} has {', '.join(configs):.80}. Choose one."
                )
            builder = datasets.load_dataset_builder(
                str(folder), name=config or default, cache_dir=str(Path(scratch, "cache"))
            )
            found = builder.config.data_files or {}
        except UserError:
            raise
        except Exception as error:  # of YAML, of patterns, of formats: datasets has many
            reason = str(error).replace(f"{folder}/", "").replace(str(folder), where)
            raise UserError(
                f"{where}: has no splits that can be made out ({' '.join(reason.split()):.120}). "
                "Download the files you want and set data.source to file."
            ) from None
        splits = {
            str(split): [_inside(file, folder, where) for file in dict.fromkeys(files)]
            for split, files in found.items()
        }
    unreadable = [name for files in splits.values() for name in files if not is_readable(name)]
    if unreadable:
        raise UserError(f"{where}: cannot read {unreadable[0]}. Convert it to {SUPPORTED}.")
    return splits


def _inside(file: str, folder: Path, where: str) -> str:
    path = Path(file).resolve()
    if "://" in file or not path.is_relative_to(folder):
        raise UserError(f"{where}: its {_CARD} names {file:.60}, a file elsewhere. Do not use it.")
    return path.relative_to(folder).as_posix()


def _one_of(splits: Mapping[str, object], names: Iterable[str]) -> str | None:
    """The split of that name, or the only one with it among its words, as in `train_sft`."""
    exact = [split for split in splits if split in names]
    similar = [s for s in splits if set(re.split(r"[^a-z]+", s.lower())) & set(names)]
    return exact[0] if exact else similar[0] if len(similar) == 1 else None


def _require_all_shards(files: list[str], where: str) -> None:
    tables: dict[tuple[str, str], int] = {}
    for file in files:
        if shard := _SHARD.fullmatch(file):
            key = shard["table"], shard["shards"]
            tables[key] = tables.get(key, 0) + 1
    for (table, shards), count in tables.items():
        if count != int(shards):
            raise UserError(
                f"{where}: has {count} of the {int(shards)} shards of {table}. Fetch them all."
            )


def fetch(repository: Repository, config: str | None, folder: Path) -> list[Part]:
    """The files of the splits, in the user's cache or downloaded into `folder`.

    Raises:
        UserError: as `choose`, `Repository.files` and `download` do.
    """
    card = [_CARD] if _CARD in repository.paths else []
    readme = download(repository, card, folder) / _CARD if card else None
    splits = choose(repository.paths, readme, config, repository.url)
    names = [name for shards in splits.values() for name in shards]
    where = download(repository, names, folder)
    return [Part(split, where / name, name) for split, names in splits.items() for name in names]
