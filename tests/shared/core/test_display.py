"""Foreign text: nothing that a terminal obeys, no password, one line."""

import ast
import json
import re
import sys
import unicodedata

import pytest

from stages.shared.core.display import LONGEST, one_line, visible
from tests import workspace
from tests.test_contract import STAGES, python_files
from tests.workspace import Workspace

DIRECTED = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
CONTROLS = [
    char
    for char in map(chr, range(0x3000))
    if unicodedata.category(char) in ("Cc", "Zl", "Zp")
    or unicodedata.bidirectional(char) in DIRECTED
]
HOSTILE = "".join(CONTROLS) + "\r\x1b]0;x\x07\x9b31m"
OBEYED = re.compile(f"[{re.escape(''.join({*CONTROLS} - {*chr(9), *chr(10)}))}]")


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace.make(tmp_path_factory.mktemp("display") / "space")


def shown_by(space: Workspace, *command: str) -> str:
    """What a command shows, all of it harmless."""
    done = space.run(sys.executable, *command)
    shown = done.stdout + done.stderr
    assert done.returncode == 1
    assert not OBEYED.search(shown), repr(shown)
    return shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31m\u202eb\x85\tc\n", "a\\x1b[31m\\u202eb\\x85\tc\n"),
        ("naïve 日本語 👩‍💻 → ×", "naïve 日本語 👩‍💻 → ×"),
        ("http://me:pass@host:80/a failed", "http://***@host:80/a failed"),
        ("'https://hf_token@host'", "'https://***@host'"),
        ("proxy HTTPS://a:p@ss@proxy:3128", "proxy HTTPS://***@proxy:3128"),
        ("data.path: 'https:/me:pass@host/x.jsonl'", "data.path: 'https:/***@host/x.jsonl'"),
        ("https://huggingface.co/a/b@main, me@b.org", "https://huggingface.co/a/b@main, me@b.org"),
    ],
)
def test_visible_spells_controls_out_and_hides_passwords(text: str, expected: str) -> None:
    assert visible(text) == expected
    assert len(CONTROLS) > 70 and not OBEYED.search(visible(HOSTILE))


def test_one_line_keeps_beginning_and_end() -> None:
    line = one_line("a.csv:1: column " + "x\n" * 5000 + "stands there twice. Rename one.")
    assert line.startswith("a.csv:1: column x x") and line.endswith(" twice. Rename one.")
    assert len(line) == LONGEST + len(" […] ")


def test_command_shows_nothing_that_a_terminal_obeys(space: Workspace) -> None:
    script = """
import json, logging, warnings, sys
from stages.shared.core import command, display
text = json.loads(sys.argv.pop())
def main():
    print(text, end=text)
    print(text, file=sys.stderr)
    warnings.warn(text)
    logging.getLogger("library").warning(text)
    with display.bar(total=2, desc=text, unit="row") as bar:
        bar.update()
    raise command.UserError(f"{text}: is wrong")
command.run(main)
"""
    assert shown_by(space, "-c", script, json.dumps(HOSTILE)).count("x1b]0;x") >= 6


def test_names_in_files_are_shown_harmless(space: Workspace) -> None:
    name = "data\x1b[31m\u202e.csv"
    (space.root / name).write_text(f'"a{HOSTILE[11:]}","a{HOSTILE[11:]}"\n1,2\n')
    space.set_params({"data.path": name})
    assert "stands there 2 times" in shown_by(space, "-m", "stages.fetch_data")
    space.set_params({"data.path": "https://me:pass@host/x.jsonl"})
    shown = shown_by(space, "-m", "stages.fetch_data")
    assert "***@host" in shown and "pass" not in shown


def test_nothing_is_written_past_the_guard() -> None:
    """A command goes through `run`; nothing writes to a descriptor, or a stream kept before it."""
    past = {"__stdout__", "__stderr__", "buffer"}
    coloured = STAGES / "prepare/__main__.py"  # `--show` escapes the text between its colours
    assert "visible(" in coloured.read_text()
    for file in python_files(STAGES) - {coloured}:
        source = file.read_text()
        if '__name__ == "__main__"' in source:
            assert re.search(r"^    (run\(main|display\.guard\()", source, re.M), file
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = ast.unparse(node.value)
                written = f"{owner}.{node.attr}" in {"os.write", "sys.stdout.write"}
                assert not written and not (owner.startswith("sys") and node.attr in past), file
