"""Files that are whole or not there at all, and their hashes."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.shared.core.errors import UserError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder, `<target>.partial`, that becomes `target` when the block ends without an error."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path, `<target>.partial`, that becomes `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a UTF-8 text, whole or not at all."""
    with whole_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write indented JSON; NaN is refused, since JSON has none."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that a stage of ours wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    """The file's SHA-256, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """One SHA-256 over the names and contents of all files below `folder`, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """The size of all files below `folder`, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse early where the disk of `folder` is too full for `purpose`, "the quantized model"."""
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB are free; {purpose} needs {needed_bytes / 1e9:.2f} GB. "
            "Free some space and run `dvc repro` again."
        )


def link_folder(source: Path, target: Path) -> None:
    """Hard-link the files of a flat folder into `target`."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        link_or_copy(path, target / path.name)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# Byte order marks, and which of four bytes in a row are mostly NUL without one.
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32"}
_MARKS |= {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_NULS = {(1, 3): "UTF-16LE", (0, 2): "UTF-16BE", (1, 2, 3): "UTF-32LE", (0, 1, 2): "UTF-32BE"}
_LATIN = ("WINDOWS-1252", "WINDOWS-1250", "ISO-8859-2", "MACINTOSH", "CP850")
# Python's names of others and iconv's.
_OTHERS = {
    "cp1251": "WINDOWS-1251",
    "koi8_r": "KOI8-R",
    "iso8859_5": "ISO-8859-5",
    "cp866": "CP866",
}
_OTHERS |= {"cp1253": "WINDOWS-1253", "cp1255": "WINDOWS-1255", "cp1256": "WINDOWS-1256"}
_OTHERS |= {"cp932": "SHIFT_JIS", "euc_jp": "EUC-JP", "cp949": "CP949", "gb18030": "GB18030"}
_OTHERS |= {"big5": "BIG5"}


def encoding_of(sample: bytes) -> str | None:
    """The likely encoding of text that is not UTF-8, as iconv names it; None where nothing fits.

    UTF-16 and UTF-32 go by their byte order mark or their NULs. Bytes above 0x7F that stand singly
    between ASCII are of a Latin script: the code page under which most of them are letters within
    words or signs outside of them. For all others charset_normalizer judges.
    """
    for mark, name in _MARKS.items():
        if sample.startswith(mark):
            return name
    if b"\0" in sample:
        nuls = [sample[i::4].count(0) for i in range(4)]
        return _NULS.get(tuple(i for i in range(4) if 2 * nuls[i] > max(nuls)))
    high = re.findall(rb"[\x80-\xff]+", sample)
    singles = sum(len(run) == 1 for run in high)
    if _is_double_byte(sample) or 2 * singles < len(high):
        from charset_normalizer import from_bytes  # noqa: PLC0415  (for a faulty file alone)

        best = from_bytes(sample, cp_isolation=list(_OTHERS)).best()
        return _OTHERS.get(best.encoding) if best else None
    scores = {name: _latin_score(sample, name) for name in _LATIN}
    if re.search(rb"[\x8a\x8e\x9a\x9e]", sample):  # š, ž of both: many in Central Europe alone
        scores["WINDOWS-1250"] += 1
    likely = max(scores, key=lambda name: scores[name])
    return likely if scores[likely] > 0 else None


def encoding_advice(path: Path, offset: int) -> str:
    """The likely encoding of a file whose byte `offset` is not UTF-8, and how to convert it."""
    with path.open("rb") as file:
        sample = file.read(4096)
        if b"\0" not in sample:
            file.seek(max(0, offset - 1))
            sample = file.read(64 * 1024)
            sample = sample[: sample.rfind(b"\n") + 1] or sample  # ends between two characters
    name = encoding_of(sample)
    if name is None:
        return "Save it as UTF-8."
    target = f"{path.stem}.utf8{path.suffix}"
    return f"It looks like {name}. Convert it: iconv -f {name} -t UTF-8 {path} > {target}"


def _is_double_byte(sample: bytes) -> bool:
    """Whether it looks like Shift-JIS or Big5, where an ASCII byte may end a character."""
    kana = len(re.findall(rb"\x82[\x9f-\xf1]|\x83[\x40-\x96]", sample))
    common = len(re.findall(rb"[\xa4-\xc6][\x40-\x7e\xa1-\xfe]", sample))
    leads = len(re.findall(rb"[\x81-\xfe][\x40-\xfe]", sample))
    return 4 * kana > leads or 5 * common > 4 * leads > 0


def _latin_score(sample: bytes, encoding: str) -> int:
    """How many more characters beyond ASCII are plausible under a code page than are not."""
    try:
        text = sample.decode(encoding)
    except UnicodeDecodeError:
        return -1
    if re.search("[\x80-\x9f]", text):  # control characters
        return -1
    score = 0
    for match in re.finditer(r"(.?)([^\0-\x7f])(?=(.?))", text, re.DOTALL):
        before, character, after = match.groups()
        if character.isalpha():
            word = before.isalpha() or after.isalpha() or not (before + after).strip()
            score += 1 if word and not (character.isupper() and before.islower()) else -1
        else:
            score += 1 if character in "’‘" or not (before.isalpha() and after.isalpha()) else -1
    return score
