"""Encodings other than UTF-8, told from the bytes alone."""

import json
import subprocess
from pathlib import Path

import pytest

from stages.shared.data.encoding import encoding_advice, encoding_of

FRENCH = "Prix 0 €? «oui» – ça va"
CASES = [
    *(("UTF-16", FRENCH, name) for name in ("utf-16",)),
    *((name, FRENCH, name) for name in ("UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE")),
    ("UTF-32", FRENCH, "utf-32"),
    ("WINDOWS-1252", FRENCH, "cp1252"),
    ("WINDOWS-1252", "¿Cuál es la capital de España?", "latin-1"),
    ("WINDOWS-1252", "Größe – schön", "cp1252"),
    ("WINDOWS-1250", "Dzień dobry, jak się masz? Gęślą jaźń, łódź", "cp1250"),
    ("WINDOWS-1250", "Příliš žluťoučký kůň", "cp1250"),
    ("MACINTOSH", "Où est la gare? L’été à Paris", "mac_roman"),
    ("WINDOWS-1251", "Привет, как дела? Что такое столица?", "cp1251"),
    ("KOI8-R", "Привет, как дела? Что такое столица?", "koi8_r"),
    ("WINDOWS-1253", "Ποια είναι η πρωτεύουσα της Ελλάδας;", "cp1253"),
    ("SHIFT_JIS", "日本の首都はどこですか？東京です。", "shift_jis"),
    ("EUC-JP", "日本の首都はどこですか？東京です。", "euc_jp"),
    ("GB18030", "中国的首都是哪里？北京是中国的首都。", "gb18030"),
    ("BIG5", "中國的首都是哪裡？台北是台灣的首都。", "big5"),
    ("CP949", "한국의 수도는 어디입니까? 서울입니다.", "cp949"),
]


@pytest.mark.parametrize(("expected", "text", "python_name"), CASES)
def test_encoding_of_a_conversation(expected: str, text: str, python_name: str) -> None:
    lines = "".join(
        json.dumps({"messages": [{"role": "user", "content": f"{i} {text}"}]}, ensure_ascii=False)
        + "\n"
        for i in range(5)
    )
    assert encoding_of(lines.encode(python_name)) == expected


def test_encoding_of_bytes_that_fit_nothing() -> None:
    assert encoding_of(bytes(range(0x80, 0x100)) * 3) is None


@pytest.mark.parametrize("python_name", ["utf-16", "utf-16-be", "cp1252"])
def test_the_advised_command_restores_the_text(tmp_path: Path, python_name: str) -> None:
    path = tmp_path / "train.jsonl"
    text = '{"text": "plain"}\n' * 500 + json.dumps({"text": FRENCH}, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode(python_name))
    with pytest.raises(UnicodeDecodeError) as fault:
        path.read_text(encoding="utf-8")
    advice = encoding_advice(path, fault.value.start)
    command = advice.partition("Convert it: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "train.utf8.jsonl").read_text(encoding="utf-8") == text
