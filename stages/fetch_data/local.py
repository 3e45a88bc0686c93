"""The files of the user's own disk that hold the splits."""

from pathlib import Path

from stages.fetch_data.formats import EXTENSIONS, SUPPORTED
from stages.fetch_data.part import EVAL_NAMES, SYNONYMS, Part, Split
from stages.shared.core.errors import UserError


def find(path: Path) -> list[Part]:
    """A file is the training split; a folder has `train.*` and may have `eval.*`.

    Raises:
        UserError: nothing is there, no split can be made out, or more than one file could be it.
    """
    if path.is_dir():
        return _find_in_folder(path)
    if not path.exists():
        raise UserError(
            f"params.yaml: data.path is {str(path)!r}, where nothing is; "
            f"expected a {SUPPORTED} file, or a folder with train.* and eval.*; "
            "correct it (an absolute path also works in `dvc exp run --temp` and `--queue`)"
        )
    if path.suffix.lower() not in EXTENSIONS:
        raise UserError(
            f"params.yaml: data.path is {str(path)!r}, which ends in {path.suffix or 'nothing'!r}; "
            f"expected {SUPPORTED}; convert or rename it"
        )
    return [Part("train", path, str(path))]


def _find_in_folder(folder: Path) -> list[Part]:
    train = _only_file(folder, "train")
    if train is None:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{folder}: has no train file, but {found}; "
            f"expected train.* ({SUPPORTED}) and, if there is one, eval.*; rename the files"
        )
    held_out = (_only_file(folder, name) for name in EVAL_NAMES)
    held_out_file = next((path for path in held_out if path), None)
    splits: list[tuple[Split, Path | None]] = [("train", train), ("eval", held_out_file)]
    return [Part(split, path, str(path)) for split, path in splits if path]


def _only_file(folder: Path, name: str) -> Path | None:
    found = sorted(
        path
        for path in folder.iterdir()
        if SYNONYMS.get(path.stem.lower(), path.stem.lower()) == name
        and path.suffix.lower() in EXTENSIONS
        and path.is_file()
    )
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(
            f"{folder}: has {names}; expected one file named {name}.*; "
            "remove one, or put them into one file"
        )
    return found[0] if found else None
