"""UTF-8, or one line that names the encoding and the command that converts it."""

import codecs
import gzip
import io
import re
from pathlib import PurePath

from stages.shared.core import files
from stages.shared.core.errors import UserError

File = io.BufferedReader | gzip.GzipFile
CHUNK = 1 << 20  # bytes
_HIGH = bytes(range(0x80, 0x100))
_UNDECODED = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, by surrogateescape


def require_utf8(file: File, name: str) -> None:
    """Refuse a file in another encoding; damaged lines of a UTF-8 file may pass.

    Raises:
        UserError: most bytes beyond ASCII are not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    high = undecoded = 0
    line, sample = 1, b""
    for number, chunk in enumerate(iter(lambda: file.read(CHUNK), b"")):
        if not number and (chunk.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in chunk[:64]):
            raise _refusal(name, 1, chunk[:4096])
        text = decoder.decode(chunk)
        if not text.isascii():
            high += len(chunk) - len(chunk.translate(None, _HIGH))
            undecoded += len(_UNDECODED.findall(text))
        if sample:
            continue
        if undecoded and (first := _UNDECODED.search(text)):
            at = len(text[: first.start()].encode("utf-8", "surrogateescape"))
            sample = chunk[max(0, at - 1) : at + 64 * 1024]
            sample = sample[: sample.rfind(b"\n") + 1] or sample  # ends between two characters
            text = text[: first.start()]
        line += text.count("\n")
    if 2 * undecoded > high:
        raise _refusal(name, line, sample)


def _refusal(name: str, line: int, sample: bytes) -> UserError:
    encoding, file = files.encoding_of(sample), PurePath(name)
    if encoding is None:
        return UserError(f"{name}:{line}: is not UTF-8. Export it as UTF-8.")
    unpack = {".gz": "zcat", ".zst": "zstdcat"}.get(file.suffix.lower(), "cat")
    target = f"{file.name.partition('.')[0]}.utf8{'' if unpack == 'cat' else file.suffixes[-2]}"
    target += file.suffix if unpack == "cat" else ""
    return UserError(
        f"{name}:{line}: is not UTF-8 but looks like {encoding}. Convert it: "
        f"`{unpack} {file.name} | iconv -f {encoding} -t UTF-8 > {target}`."
    )
