"""Files of the training and held-out splits, on the user's disk or in a data set on the hub."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from stages.fetch_data.formats import SUPPORTED, is_readable, read
from stages.shared.core import bounds, files
from stages.shared.core.errors import UserError, require_regular
from stages.shared.hub.repository import Repository, download, download_folder, pin, require_inside

if TYPE_CHECKING:
    from stages.fetch_data.__main__ import Data

Split = Literal["train", "eval"]

_TRAIN = ("train", "training")
# Names of the held-out split, most preferred first.
_EVAL = ("eval", "evaluation", "validation", "valid", "val", "dev", "test", "testing")
_CARD = "README.md"
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
_IGNORED = re.compile(r"\.|(README|LICEN[CS]E|CHANGELOG|NOTICE)\b", re.IGNORECASE)
_INSTEAD = "Download the files you want and set data.source to file."


@dataclass(frozen=True)
class Part:
    """A file of a split: its only one, or one of its ordered shards."""

    split: Split
    path: Path
    name: str  # for messages: the user's path, or the path in the repository
    source: str | None = None  # one of several in a folder


def fetch(data: "Data", raw: Path, limit: int) -> None:
    """Write `raw/<split>.jsonl`, rows of at most `limit` bytes, and `raw/source.json`."""
    source: dict[str, Any] = {"source": data.source}
    if data.source == "hub":
        repository = pin("dataset", data.repo, data.revision)
        source |= {"repo": data.repo, "revision": data.revision, "config": data.config}
        with download_folder(repository) as folder:
            source["files"] = write(_download(repository, data.config, folder), raw, limit)
    else:
        with TemporaryDirectory(dir=raw) as scratch:
            parts = _find(Path(data.path), data.config)
            source["files"] = write(parts, raw, limit, Path(scratch, "copy"))
    files.write_json(raw / "source.json", source)


def write(parts: list[Part], raw: Path, limit: int, copy: Path | None = None) -> list[Any]:
    """Write all rows; returns the entries of `source.json`.

    A local file may change meanwhile, so it is hashed and read from `copy`.
    """
    files.require_space(raw, sum(part.path.stat().st_size for part in parts), "data/raw")
    entries, lines = [], Counter[str]()
    last = {part.split: part for part in parts}
    for part in parts:
        path = shutil.copyfile(part.path, copy) if copy else part.path
        unit, rows = read(part.path, part.name, path, limit)
        entry: dict[str, Any] = {"split": part.split, "name": part.name}
        entry |= {} if part.source is None else {"source": part.source}
        entry |= {"sha256": files.sha256(path), "bytes": path.stat().st_size}
        entries.append({**entry, "first_line": lines[part.split] + 1, "counted_in": unit})
        with (raw / f"{part.split}.jsonl").open("ab") as out:
            for row in rows:
                lines[part.split] += 1
                ended = row.endswith(b"\n") or part is last[part.split]
                out.write(row if ended else row + b"\n")
    return entries


def _download(repository: Repository, config: str | None, folder: Path) -> list[Part]:
    """Splits of a data set on the hub, downloaded unless the user's cache has them."""
    card = [_CARD] if _CARD in repository.paths else []
    root = download(repository, card, folder)
    splits = choose(repository.paths, root / _CARD, config, repository.url)
    names = [(split, name) for split, names in splits.items() for name in names]
    root = download(repository, [name for _, name in names], folder)
    return [Part(split, root / name, name) for split, name in names]


def _find(path: Path, config: str | None) -> list[Part]:
    """Local files: one file, a folder of one data set, or a folder of several sources.

    Sources without a held-out split come first: `prepare` then knows all that is held out when it
    reads the training rows of the others.
    """
    if path.is_file():
        return _shards([path])
    if not path.is_dir():
        advice = "Correct it (`dvc exp run --temp` and `--queue` need an absolute path)."
        raise UserError(f"data.path: {str(path)!r} is no file or folder. {advice}")
    for link in path.rglob("*"):
        if link.is_symlink() and link.is_dir():
            fault = "is a link to a folder, in which DVC sees no change"
            raise UserError(f"{link}: {fault}. Put the folder there, or set data.path to it.")
    parts = [
        replace(part, source=name)
        for name, paths in ({} if config else _sources(path)).items()
        for part in (_find_in(paths[0], None) if paths[0].is_dir() else _shards(paths))
    ]
    with_eval = {part.source for part in parts if part.split == "eval"}
    parts.sort(key=lambda part: part.source in with_eval)
    return parts or _find_in(path, config)


def _find_in(folder: Path, config: str | None) -> list[Part]:
    """Files of a folder with train.* and eval.*, or of one laid out as on the hub."""
    present = (f for f in folder.rglob("*") if not f.is_dir() and f.exists())
    regular = (f for f in map(require_regular, present) if f.name not in _METADATA)
    names = [f.relative_to(folder).as_posix() for f in regular]
    splits = _by_stem(names, folder) or choose(names, folder / _CARD, config, str(folder))
    paths = [(split, folder / name) for split, names in splits.items() for name in names]
    return [Part(split, path, str(path)) for split, path in paths]


def _shards(paths: list[Path]) -> list[Part]:
    for path in map(require_regular, paths):
        if not is_readable(path.name):
            raise UserError(f"data.path: cannot read {str(path)!r}. Convert it to {SUPPORTED}.")
    return [Part("train", path, str(path)) for path in paths]


def _sources(folder: Path) -> dict[str, list[Path]]:
    """Files or folder of each source; nothing if the folder is one data set.

    It is if an entry is named for a split, its README lists data files, or there is one entry.
    """
    sources: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name in _METADATA or _IGNORED.match(entry.name):
            continue
        stem = entry.name if entry.is_dir() else entry.name.partition(".")[0]
        if _words(stem) & {*_TRAIN, *_EVAL}:
            return {}
        sources.setdefault(re.sub(r"([-_]?\d+(-of)?)+$", "", stem) or stem, []).append(entry)
    card = folder / _CARD
    has_card = card.is_file() and "data_files" in card.read_text("utf-8", "replace")
    if has_card or len(sources) < 2:
        return {}
    for name, paths in sources.items():
        if len(paths) > 1 and any(path.is_dir() for path in paths):
            raise UserError(f"{folder}: has two sources {name}. Rename one.")
    return sources


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _by_stem(names: Collection[str], folder: Path) -> dict[Split, list[str]]:
    """Files train.* and eval.* of a folder; nothing if it has no train.*."""
    readable = [name for name in sorted(names) if "/" not in name and is_readable(name)]

    def match(*stems: str) -> list[str]:
        return [name for name in readable if name.partition(".")[0].lower() in stems]

    train, held_out = match(*_TRAIN), next(filter(None, map(match, _EVAL)), [])
    if not train:
        return {}
    for same in (train, held_out):
        if len(same) > 1:
            raise UserError(f"{folder}: {same[0]} and {same[1]} could be one split. Remove one.")
    return {"train": train, "eval": held_out}


def choose(
    names: Iterable[str], card: Path, config: str | None, where: str
) -> dict[Split, list[str]]:
    """Shards of the training and the held-out split, of a data set's files and its README.md."""
    splits = _splits(names, card, config, where)
    held_out = next((split for name in _EVAL if (split := _find_split(splits, [name]))), "")
    train = _find_split(splits, _TRAIN)
    if train is None and len(splits) == 1 and not held_out:
        [train] = splits
    if train is None:
        raise UserError(f"{where}: has no one split train, but {', '.join(splits):.60}. {_INSTEAD}")
    chosen: dict[Split, list[str]] = {"train": splits[train], "eval": splits.get(held_out, [])}
    for shards in chosen.values():
        tables = Counter(re.sub(r"-\d{5}-of-(\d{5})", r" of \1", name) for name in shards)
        for table, count in tables.items():
            if (total := re.search(r" of (\d{5})", table)) and count != int(total[1]):
                raise UserError(f"{where}: has {count} shards of {table}. Fetch them all.")
        for name in shards:
            if not is_readable(name):
                raise UserError(f"{where}: cannot read {name}. Convert it to {SUPPORTED}.")
            if name in chosen["train"] and name in chosen["eval"]:
                raise UserError(f"{where}: {name} is by name in train and {held_out}. Rename it.")
    return chosen


def _find_split(splits: Iterable[str], names: Collection[str]) -> str | None:
    """The split of that name, else the only one with it as a word, as in `train_sft`."""
    exact = [split for split in splits if split in names]
    similar = [split for split in splits if not _words(split).isdisjoint(names)]
    return exact[0] if exact else similar[0] if len(similar) == 1 else None


def _splits(
    names: Iterable[str], card: Path, config: str | None, where: str
) -> dict[str, list[str]]:
    """Split → files of one configuration, by the rules of `datasets`.

    It sees empty files of the same names: a local folder `owner/name` cannot shadow the hub's.
    """
    import datasets  # noqa: PLC0415  (takes a second)

    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "skeleton").resolve()
        for name in names:
            if Path(name).name not in (_CARD, "dataset_infos.json"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
        folder.mkdir(exist_ok=True)
        if card.is_file():
            shutil.copyfile(card, folder / _CARD)
        try:
            with bounds.limited(60):  # for YAML and patterns of the card
                known = datasets.get_dataset_config_names(str(folder))
                chosen = config or datasets.get_dataset_default_config_name(str(folder))
                if chosen in known:
                    builder = datasets.load_dataset_builder(
                        str(folder), name=chosen, cache_dir=str(Path(scratch, "cache"))
                    )
        except Exception as error:  # datasets raises many types, of YAML, patterns, formats
            reason = " ".join(str(error).replace(str(folder), where).split())
            raise UserError(f"{where}: splits not found ({reason:.120}). {_INSTEAD}") from None
        if chosen not in known:
            names = f"{', '.join(known):.80}"
            raise UserError(f"data.config: is {config!r}; {where} has {names}. Choose one.")
        splits: dict[str, list[str]] = {}
        for split, files in (builder.config.data_files or {}).items():
            paths = [Path(file).resolve() for file in dict.fromkeys(files)]
            splits[str(split)] = [os.path.relpath(path, folder) for path in paths]
            for name in splits[str(split)]:
                require_inside(name, f"{where}/{_CARD}")
        return splits
