"""Encoding of text that is not UTF-8, told from its bytes, and the command that converts it."""

import re
from pathlib import Path

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
