"""Encoding of text that is not UTF-8, told from its bytes, and the command that converts it."""

import re
from pathlib import Path
from shlex import quote

# Byte order marks, and which of four bytes in a row are mostly NUL without one.
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32"}
_MARKS |= {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_NULS = {(1, 3): "UTF-16LE", (0, 2): "UTF-16BE", (1, 2, 3): "UTF-32LE", (0, 1, 2): "UTF-32BE"}
# Python's names and iconv's.
_LATIN = {"cp1252": "WINDOWS-1252", "cp1250": "WINDOWS-1250", "iso8859_2": "ISO-8859-2"}
_LATIN |= {"mac_roman": "MACINTOSH", "cp850": "CP850"}
_OTHERS = {"cp1251": "WINDOWS-1251", "koi8_r": "KOI8-R", "iso8859_5": "ISO-8859-5"}
_OTHERS |= {"cp866": "CP866", "cp1253": "WINDOWS-1253", "cp1255": "WINDOWS-1255"}
_OTHERS |= {"cp1256": "WINDOWS-1256", "cp932": "SHIFT_JIS", "euc_jp": "EUC-JP", "cp949": "CP949"}
_OTHERS |= {"gb18030": "GB18030", "big5": "BIG5"}


def encoding_of(sample: bytes) -> str | None:
    """The likely encoding of text that is not UTF-8, as iconv names it; None where nothing fits.

    UTF-16 and UTF-32 go by their byte order mark or their NULs, others by charset_normalizer; of
    Latin scripts the code page under which most bytes above 0x7F are letters within words or signs
    outside of them.
    """
    for mark, name in _MARKS.items():
        if sample.startswith(mark):
            return name
    if b"\0" in sample:
        nuls = [sample[i::4].count(0) for i in range(4)]
        return _NULS.get(tuple(i for i in range(4) if 2 * nuls[i] > max(nuls)))
    from charset_normalizer import from_bytes  # noqa: PLC0415  (for a faulty file alone)

    best = from_bytes(sample, cp_isolation=[*_LATIN, *_OTHERS]).best()
    if best is None:
        return None
    if best.encoding in _OTHERS:
        return _OTHERS[best.encoding]
    scores = {name: _latin_score(sample, name) for name in _LATIN.values()}
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
    source, target = quote(str(path)), quote(f"{path.stem}.utf8{path.suffix}")
    return f"It looks like {name}. Convert it: iconv -f {name} -t UTF-8 {source} > {target}"


def _latin_score(sample: bytes, encoding: str) -> int:
    """Plausible characters beyond ASCII under a code page, less the implausible ones."""
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
