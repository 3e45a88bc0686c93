"""The encoding of a text file, and the command that converts it to UTF-8."""

import codecs
import gzip
import io
import re
from pathlib import PurePath

from stages.shared.core.errors import UserError

File = io.BufferedReader | gzip.GzipFile
CHUNK = 1 << 20  # bytes
_HIGH = bytes(range(0x80, 0x100))
_UNDECODED = re.compile("[\udc80-\udcff]+")  # bytes that are not UTF-8, by surrogateescape
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16"}
_MARKS |= {b"\xfe\xff": "UTF-16"}


def require_utf8(file: File, name: str) -> None:
    """Refuse a file in another encoding; single damaged lines of a UTF-8 file may pass.

    Raises:
        UserError: with the encoding, as far as the bytes tell it, and the command that converts.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    high, runs, first, lines = 0, list[str](), "", 1
    for number, chunk in enumerate(iter(lambda: file.read(CHUNK), b"")):
        if not number and (encoding := _unicode_encoding(chunk[:4])):
            raise UserError(f"{name}: is {encoding}. Convert it: {_iconv(encoding, name)}")
        text = decoder.decode(chunk)
        if not text.isascii():
            high += len(chunk) - len(chunk.translate(None, _HIGH))
            runs += _UNDECODED.findall(text)
        if runs and not first:
            at = _UNDECODED.search(text).start()  # type: ignore[union-attr]
            first = text[max(0, at - 15) : at + 15]
            lines += text.count("\n", 0, at)
        elif not first:
            lines += text.count("\n")
    undecoded = sum(map(len, runs))
    if 2 * undecoded <= high:
        return
    # In Western languages most letters beyond ASCII stand alone; elsewhere they make up the words.
    western = 2 * sum(len(run) == 1 for run in runs) > len(runs)
    try:
        sample = first.encode("utf-8", "surrogateescape").decode("cp1252") if western else ""
    except UnicodeDecodeError:  # one of the five bytes that mean nothing in it
        sample = ""
    if sample:
        raise UserError(
            f"{name}:{lines}: is not UTF-8; as Windows-1252 it reads {' '.join(sample.split())!r}. "
            f"If that is right: {_iconv('WINDOWS-1252', name)}"
        )
    raise UserError(
        f"{name}:{lines}: is not UTF-8, and of no encoding that its bytes tell. Export it as UTF-8."
    )


def _unicode_encoding(head: bytes) -> str:
    """The encoding that a byte order mark or the NULs among ASCII letters show."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    if len(head) == 4 and head[1::2] == b"\0\0":
        return "UTF-16LE"
    return "UTF-16BE" if len(head) == 4 and head[::2] == b"\0\0" else ""


def _iconv(encoding: str, name: str) -> str:
    return f"`iconv -f {encoding} -t UTF-8 {PurePath(name).name} > utf8{PurePath(name).suffix}`"
