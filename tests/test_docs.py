"""Documents hold against the repository: tests, files and commands that they name are there."""

import re
from difflib import get_close_matches
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*/*.md")])
TEST = re.compile(r"`(tests/[\w/]+(?:\.py)?)(?:::(\w+))?`")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#[^)]*)?\)")


def test_named_tests_exist():
    stale = []
    for page in PAGES:
        for path, name in TEST.findall(page.read_text(encoding="utf-8")):
            file = ROOT / path
            known = re.findall(r"def (test_\w+)", file.read_text()) if file.is_file() else []
            if not file.exists() or (name and name not in known):
                stale.append((page.name, path, name, get_close_matches(name, known, 1, 0.4)))
    assert not stale


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert not [link for link in links if link and not (page.parent / link).exists()]


def test_readme_names_files_and_targets_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"`((?:stages|docs|tests)/[\w/.]+)`", text)
    assert not [name for name in files if not (ROOT / name).exists()]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z]+)", text)) <= targets


COMMAND = re.compile(r"python -m ((?:stages|benchmarks)(?:\.\w+)+)([^`#\n|]*)")
PARAMETER = re.compile(r"(?:-S|--set|--set-param)[ =]'?(\w+)\.(\w+)=")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_have_modules_options_and_parameters(page: Path):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    if page.name == "CHANGELOG.md":  # names what is gone
        return
    for module, arguments in COMMAND.findall(text):
        path = ROOT / module.replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert file.exists(), module
        for option in re.findall(r"--[\w-]+", arguments):
            assert f'"{option}"' in file.read_text(encoding="utf-8"), f"{module} {option}"
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, key in PARAMETER.findall(text):
        assert key in values[section], f"{section}.{key}"


def test_pages_keep_to_their_length():
    words = {page: len(page.read_text(encoding="utf-8").split()) for page in PAGES}
    assert words[ROOT / "README.md"] <= 1200
