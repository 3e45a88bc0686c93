"""Dependencies, parameters and outs in dvc.yaml, compared with the code."""

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

from stages.shared.core import params

ROOT = Path(__file__).parents[1]
STAGES = ROOT / "stages"
SHARED = STAGES / "shared"


def pipeline() -> dict[str, Any]:
    """`stages` of dvc.yaml, read as YAML 1.2, as DVC does (`on` is a key, and not true)."""
    return YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


def declared() -> dict[str, dict[str, Any]]:
    """Every stage of dvc.yaml; of a `foreach`, the body with all its items' paths filled in."""
    result = {}
    for name, stage in pipeline().items():
        for key, item in stage.get("foreach", {"": {}}).items():
            text = yaml.safe_dump(stage.get("do", stage)).replace("${key}", key)
            for field, value in item.items():
                text = text.replace(f"${{item.{field}}}", value)
            result[f"{name}@{key}" if key else name] = yaml.safe_load(text)
    return result


def folder_of(stage: str) -> str:
    """`evaluate@base` is computed by stages/evaluate."""
    return stage.partition("@")[0]


def paths(entries: list[Any]) -> list[str]:
    """`[a, {b: {cache: false}}]` as `[a, b]`."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def sections(stage: dict[str, Any]) -> list[str]:
    """Sections of params.yaml; `prepare.max_row_bytes` is in `prepare`."""
    return [name.partition(".")[0] for name in stage["params"]]


def outs_of(stage: dict[str, Any]) -> list[str]:
    return [p for kind in ("outs", "metrics", "plots") for p in paths(stage.get(kind, []))]


def python_files(path: Path) -> set[Path]:
    """A file itself; of a folder, all below it."""
    return set(path.rglob("*.py")) if path.suffix != ".py" else {path}


@cache
def imports_of(file: Path) -> frozenset[Path]:
    """The local files that a file imports itself, also inside a function."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    names = [ROOT / module.replace(".", "/") for module in modules]
    candidates = [p for name in names for p in (name.with_suffix(".py"), name / "__init__.py")]
    return frozenset(path for path in candidates if path.exists())


def reached_from(*files: Path) -> set[Path]:
    """Files and all local files that they import, directly or not."""
    reached: set[Path] = set()
    waiting = [*files]
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting.extend(imports_of(current))
    return reached


def entry_of(stage: str) -> Path:
    return STAGES / folder_of(stage) / "__main__.py"


def unit_of(file: Path) -> Path:
    """The dependency that covers a file of stages/shared: its top folder, or the flat file."""
    return SHARED / file.relative_to(SHARED).parts[0]


def code_dependencies(stage: str) -> list[str]:
    """Folders for dvc.yaml: the stage's own, and each shared one that it imports from."""
    shared = {unit_of(file) for file in reached_from(entry_of(stage)) if SHARED in file.parents}
    folders = [STAGES / folder_of(stage), *sorted(shared)]
    return [path.relative_to(ROOT).as_posix() for path in folders]


def declared_code(stage: str) -> list[str]:
    return [path for path in paths(declared()[stage]["deps"]) if path.startswith("stages/")]


STAGE_FOLDERS = sorted({folder_of(stage) for stage in declared()})


@pytest.mark.parametrize("stage", declared())
def test_code_dependencies_are_the_folders_imported_from(stage: str) -> None:
    """Every local import lies in a declared folder; every declared folder is imported from."""
    assert sorted(declared_code(stage)) == sorted(code_dependencies(stage))


@pytest.mark.parametrize("stage", ["quantize", "train"])
def test_costly_stages_import_all_that_they_declare(stage: str) -> None:
    """Thus an edit for another stage reruns neither quantization nor training."""
    reached = reached_from(entry_of(stage))
    held = {file for name in declared_code(stage) for file in python_files(ROOT / name)}
    assert held <= reached, f"not imported: {sorted(map(str, held - reached))}"


@pytest.mark.parametrize("folder", STAGE_FOLDERS)
def test_stage_uses_its_own_files_and_no_other_stages(folder: str) -> None:
    reached, own = reached_from(entry_of(folder)), python_files(STAGES / folder)
    assert own <= reached
    assert not {f for f in reached if f not in own and SHARED not in f.parents}


def test_every_folder_is_a_stage_shared_or_tools() -> None:
    folders = {p.name for p in STAGES.iterdir() if p.is_dir()} - {"__pycache__"}
    assert folders - {"shared", "tools"} == set(STAGE_FOLDERS)


def test_tools_are_commands_that_no_stage_depends_on() -> None:
    tools = python_files(STAGES / "tools")
    commands = {file for file in tools if "\n    run(main" in file.read_text()}
    for file in commands:
        assert f"\nRun:    python -m stages.tools.{file.stem}" in file.read_text()
    assert tools <= reached_from(*commands)
    assert not tools & reached_from(*map(entry_of, STAGE_FOLDERS))


def test_shared_units_have_two_users_and_no_dead_file() -> None:
    """A user is a stage, or a command of stages/tools."""
    entries = [*map(entry_of, STAGE_FOLDERS), *python_files(STAGES / "tools")]
    reached = {entry: reached_from(entry) for entry in entries}
    assert python_files(SHARED) <= set().union(*reached.values())
    for unit in {unit_of(file) for file in python_files(SHARED)}:
        users = [e for e, found in reached.items() if any(unit in (f, *f.parents) for f in found)]
        assert len(users) >= 2, f"{unit.name} is used by {users or 'nobody'} alone"


def test_no_stage_imports_torch_before_its_parameters_are_read() -> None:
    """Nor transformers: a mistake in params.yaml is reported at once."""
    mains = ", ".join(f"stages.{folder}.__main__" for folder in STAGE_FOLDERS)
    script = f"import sys, {mains}\nassert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("stage", declared())
def test_parameters_are_the_sections_that_the_schema_names(stage: str) -> None:
    name = "config" if (STAGES / folder_of(stage) / "config.py").exists() else "__main__"
    schema = importlib.import_module(f"stages.{folder_of(stage)}.{name}").Params
    assert list(schema.model_fields) == sections(declared()[stage])


def test_params_yaml_has_no_unread_section() -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert set(values) == {name for stage in declared().values() for name in sections(stage)}
    params.check(values)


PATH_LITERAL = re.compile(r'Path\(\s*f?"((?:data|models|reports)[^"]*)"\s*\)')


@pytest.mark.parametrize("stage", declared())
def test_paths_in_the_code_are_dependencies_and_outs(stage: str) -> None:
    """Each path constant of a stage is in dvc.yaml, and each path of dvc.yaml in the code."""
    folder = folder_of(stage)
    same = [body for name, body in declared().items() if folder_of(name) == folder]
    everything = {p for body in same for p in [*paths(body["deps"]), *outs_of(body)]}
    literals = set(
        PATH_LITERAL.findall("".join(f.read_text() for f in python_files(STAGES / folder)))
    )

    def related(one: str, others: set[str]) -> bool:
        return any(f"{one}/".startswith(f"{o}/") or f"{o}/".startswith(f"{one}/") for o in others)

    for literal in literals:
        assert related(literal, everything), f"{literal} is not in dvc.yaml"
    named = {*paths(declared()[stage]["deps"]), *outs_of(declared()[stage])}
    for path in named - {"${data.path}", "params.yaml", "matplotlibrc"}:
        assert path.startswith("stages/") or related(path, literals), f"{path} is not in the code"


@pytest.mark.parametrize("stage", declared())
def test_stages_that_draw_depend_on_the_style(stage: str) -> None:
    """Matplotlib reads ./matplotlibrc when it is imported."""
    sources = "".join(file.read_text() for file in reached_from(entry_of(stage)))
    assert ("matplotlibrc" in paths(declared()[stage]["deps"])) == ("matplotlib" in sources)


def test_no_value_of_params_yaml_stands_in_a_command() -> None:
    for stage in pipeline().values():
        command = stage.get("do", stage)["cmd"]
        assert set(re.findall(r"\$\{([^}]*)\}", command)) <= {"key"}


def test_artifacts_are_outs() -> None:
    artifacts = YAML(typ="safe").load(ROOT / "dvc.yaml")["artifacts"]
    outs = {path for stage in declared().values() for path in outs_of(stage)}
    assert {"merged", "adapter"} <= artifacts.keys()
    assert all(a["path"] in outs and a["type"] == "model" and a["desc"] for a in artifacts.values())


if __name__ == "__main__":  # what dvc.yaml should name
    for stage_folder in STAGE_FOLDERS:
        print(f"{stage_folder}:", *code_dependencies(stage_folder), sep="\n      - ")
