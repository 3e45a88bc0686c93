"""dvc.yaml held against the code: dependencies are proven here, not remembered."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
STAGES = ROOT / "stages"


def pipeline() -> dict[str, Any]:
    """`stages` of dvc.yaml, read as YAML 1.2, as DVC does (`on` is a key, and not true)."""
    return YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


def declared() -> dict[str, dict[str, Any]]:
    """Every stage of dvc.yaml; of a `foreach`, the body with all its items' paths filled in."""
    result = {}
    for name, stage in pipeline().items():
        if "foreach" not in stage:
            result[name] = stage
            continue
        text = yaml.safe_dump(stage["do"])
        for key, item in stage["foreach"].items():
            filled = text.replace("${key}", key)
            for field, value in item.items():
                filled = filled.replace(f"${{item.{field}}}", value)
            result[f"{name}@{key}"] = yaml.safe_load(filled)
    return result


def room_of(stage: str) -> str:
    return stage.partition("@")[0]


def paths(entries: list[Any]) -> list[str]:
    """`[a, {b: {cache: false}}]` as `[a, b]`."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def outs_of(stage: dict[str, Any]) -> list[str]:
    return [p for kind in ("outs", "metrics", "plots") for p in paths(stage.get(kind, []))]


def files_of_room(room: str) -> list[Path]:
    folder = STAGES / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [STAGES / f"{room}.py"]


@cache
def imports_of(file: Path) -> frozenset[Path]:
    """The local files that a file imports itself, also inside a function."""

    def modules() -> Iterator[str]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    found = (ROOT / f"{module.replace('.', '/')}.py" for module in modules())
    return frozenset(path for path in found if path.exists())


def reached_from(file: Path) -> set[Path]:
    """A file and all local files that it imports, followed through."""
    seen: set[Path] = set()
    waiting = [file]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting.extend(imports_of(current))
    return seen


def entry_of(room: str) -> Path:
    folder = STAGES / room
    return folder / "__main__.py" if folder.is_dir() else STAGES / f"{room}.py"


def code_dependencies(room: str) -> list[str]:
    """What dvc.yaml must name: the room, and each shared file that it reaches."""
    own = STAGES / room if (STAGES / room).is_dir() else STAGES / f"{room}.py"
    shared = [f for f in reached_from(entry_of(room)) if f.parent == STAGES / "shared"]
    return [p.relative_to(ROOT).as_posix() for p in [own, *sorted(shared)]]


@pytest.mark.parametrize("stage", declared())
def test_code_dependencies_are_the_modules_that_are_imported(stage: str) -> None:
    named = [d for d in paths(declared()[stage]["deps"]) if d.startswith("stages/")]
    assert sorted(named) == sorted(code_dependencies(room_of(stage)))


@pytest.mark.parametrize("room", sorted({room_of(stage) for stage in declared()}))
def test_every_file_of_a_room_is_used_and_none_imports_another_room(room: str) -> None:
    reached, own = reached_from(entry_of(room)), set(files_of_room(room))
    assert own <= reached
    strangers = {f for f in reached if f not in own and f.parent != STAGES / "shared"}
    assert not strangers


def test_every_room_is_a_stage_and_every_shared_file_is_used_by_two_rooms() -> None:
    rooms = {room_of(stage) for stage in declared()}
    folders = {p.stem for p in STAGES.iterdir() if p.name not in ("shared", "__pycache__")}
    assert folders == rooms
    for file in (STAGES / "shared").glob("*.py"):
        users = {r for r in rooms if file in reached_from(entry_of(r))}
        assert len(users) >= 2, f"{file.name} is used by {users or 'nobody'} alone"


def test_no_stage_imports_torch_before_its_parameters_are_known_to_be_right() -> None:
    """Nor transformers: a mistake in params.yaml is told at once."""
    rooms = sorted({room_of(stage) for stage in declared()})
    mains = [f"stages.{room}.__main__" for room in rooms if (STAGES / room).is_dir()]
    script = "\n".join(f"import {name}" for name in ["sys", *mains])
    script += "\nprint(*{'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(mains) > 8
    assert found.stdout.split() == []


@pytest.mark.parametrize("stage", declared())
def test_parameters_are_the_sections_that_the_schema_names(stage: str) -> None:
    room = room_of(stage)
    settings = STAGES / room / "settings.py"
    name = f"stages.{room}.settings" if settings.exists() else f"stages.{room}"
    if not settings.exists() and (STAGES / room).is_dir():
        name += ".__main__"
    schema = importlib.import_module(name).Params
    assert list(schema.model_fields) == declared()[stage]["params"]


def test_params_yaml_fits_every_schema_and_has_no_section_that_nobody_reads() -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    read = {section for stage in declared().values() for section in stage["params"]}
    assert set(values) == read


PATH_LITERAL = re.compile(r'Path\(\s*f?"((?:data|models|reports)[^"]*)"\s*\)')


@pytest.mark.parametrize("stage", declared())
def test_paths_in_the_code_are_dependencies_and_outs(stage: str) -> None:
    """A room's path constants and the paths in dvc.yaml cover each other."""
    body, room = declared()[stage], room_of(stage)
    named = [d for d in paths(body["deps"]) if not d.startswith("stages/")] + outs_of(body)
    sources = "".join(f.read_text() for f in files_of_room(room))
    literals = set(PATH_LITERAL.findall(sources))
    assert literals or room == "fetch_data"

    def related(one: str, other: str) -> bool:
        return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")

    everything = [
        p
        for name, other in declared().items()
        if room_of(name) == room
        for p in [*paths(other["deps"]), *outs_of(other)]
    ]
    for literal in literals:
        assert any(related(literal, p) for p in everything), f"{literal} is not in dvc.yaml"
    for path in named:
        if path not in {"${data.path}", "params.yaml"}:
            assert any(related(literal, path) for literal in literals), f"{path} is not in the code"


def test_no_value_of_params_yaml_stands_in_a_command() -> None:
    for stage in pipeline().values():
        command = stage.get("do", stage)["cmd"]
        assert set(re.findall(r"\$\{([^}]*)\}", command)) <= {"key"}


def test_every_stage_says_what_it_is_for() -> None:
    assert all(stage["desc"] for stage in declared().values())


if __name__ == "__main__":  # what dvc.yaml should name
    for name in sorted({room_of(s) for s in declared()}):
        print(f"{name}:", *code_dependencies(name), sep="\n      - ")
