"""The embedded conversations are the files that their pages describe."""

import hashlib
import json
import re
import runpy
from pathlib import Path

import pytest

from stages.evaluate.generate import is_correct

DATA = Path(__file__).parents[1] / "data"
MARKER = re.compile(r"### (Human|Assistant): ")


@pytest.mark.parametrize("folder", ["sample", "sample_tools"])
def test_sample_is_the_file_that_its_page_names(folder: str) -> None:
    digest = hashlib.sha256((DATA / folder / "conversations.jsonl").read_bytes()).hexdigest()
    assert digest in (DATA / folder / "README.md").read_text(encoding="utf-8")


def test_sample_replies_end_with_their_answer() -> None:
    """Each equation in them is true."""
    lines = (DATA / "sample/conversations.jsonl").read_text(encoding="utf-8").splitlines()
    equations, answered = 0, 0
    for row in map(json.loads, lines):
        *_, role, reply = ["", *MARKER.split(row.get("text") or "")]
        answered += role == "Assistant" and is_correct(reply, row["answer"])
        for a, sign, b, result in re.findall(r"^→ (\d+) ([-+*/]) (\d+) = (\d+)$", reply, re.M):
            left, right = int(a), int(b)
            values = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}
            assert values[sign] == int(result), (a, sign, b, result)
            equations += 1
    assert (len(lines), answered > 1200, equations > 300) == (1623, True, True)


def test_tool_sample_is_what_its_generator_writes(tmp_path: Path) -> None:
    source = (DATA / "sample_tools/generate.py").read_text(encoding="utf-8")
    (tmp_path / "generate.py").write_text(source, encoding="utf-8")
    runpy.run_path(str(tmp_path / "generate.py"), run_name="__main__")
    written = (tmp_path / "conversations.jsonl").read_bytes()
    assert written == (DATA / "sample_tools/conversations.jsonl").read_bytes()
