"""Parameters of params.yaml, checked against the schema of each stage."""

import importlib
import json
import re
from collections import ChainMap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.shared.core import bounds, files
from stages.shared.core.command import quick_imports
from stages.shared.core.errors import UserError, reading, require_regular
from stages.shared.core.machine import machine

FILE = Path("params.yaml")
LONGEST = 10**6  # characters of params.yaml as JSON
NUMBERS = ("a valid number", "a valid integer")  # as pydantic calls them


class Section(BaseModel):
    """A section that the stage owns: frozen, strict types, finite numbers, nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class BorrowedSection(BaseModel):
    """A section that another stage owns: only the keys read here; the owner checks the rest."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


P = TypeVar("P", bound=BaseModel)


def load(schema: type[P], stage: str) -> P:
    """Read the parameters that dvc.yaml declares for `stage` (`train`, `evaluate@base`).

    Through DVC, so that a stage cannot depend on a parameter that DVC does not know of. The other
    stages' sections, the machine's settings and the stage's dependencies are checked too: a mistake
    is told before a training, not after it. Raises a UserError.
    """
    with quick_imports():  # half a second that the unit tests of a schema need not pay
        from dvc.repo import Repo  # noqa: PLC0415

    check(read_file(), stage)
    machine()
    advice = "Restore dvc.yaml or dvc.lock by git, and run it at the root of a clone."
    with reading(f"stage {stage} of dvc.yaml", advice), Repo() as repo:
        declared = repo.stage.load_one(name=stage)
        values = [dep.read_params(flatten=False) for dep in declared.params]
        parameters = validate(schema, dict(ChainMap(*values)), stage)
        files.verify_dependencies(repo, declared)
    return parameters


def read_file() -> dict[str, Any]:
    """Content of params.yaml; a UserError where JSON could not hold it: a date, a loop."""
    if not require_regular(FILE).exists():
        raise UserError(f"{FILE}: not there. Run this at the root of a clone of the repository.")
    try:
        with bounds.limited(2):
            content = YAML(typ="safe").load(FILE)
            if len(json.dumps(content, default=_refuse)) > LONGEST:
                raise RecursionError
    except (bounds.Exceeded, RecursionError):
        what = "is nested or expands without end. Look for an anchor (&, *)."
        raise UserError(f"{FILE}: {what}") from None
    except (YAMLError, ValueError, TypeError) as error:
        mark, problem = (getattr(error, f"problem{end}", None) for end in ("_mark", ""))
        place = f"{FILE}:{mark.line + 1}" if mark else FILE
        reason = " ".join(str(problem or error).split())
        raise UserError(f"{place}: is no plain YAML ({reason:.80}). Correct it.") from None
    if not isinstance(content, dict):
        raise UserError(f"{FILE}: has no sections. Restore it: git checkout {FILE}")
    return content


def _refuse(value: object) -> NoReturn:
    raise UserError(f"{FILE}: {value} is a {type(value).__name__}. Quote it, if it is a text.")


def check(content: dict[str, Any], stage: str | None = None) -> None:
    """Check the sections of all stages, `stage` about to run; raises a UserError."""
    schemas = list(_schemas())
    known = dict.fromkeys(name for schema in schemas for name in schema.model_fields)
    for name in content.keys() - known.keys():
        what = f"is not a section; expected one of {', '.join(known)}"
        raise UserError(f"{FILE}: {name} {what}. Rename or remove it.")
    for schema in schemas:
        values = {name: content[name] for name in schema.model_fields if name in content}
        validate(schema, values, stage)


def _schemas() -> Iterator[type[BaseModel]]:
    """Schemas of all stages, in `config.py` or, of a few keys, in `__main__.py`."""
    for main in sorted(Path(__file__).parents[2].glob("*/__main__.py")):
        name = "config" if main.with_name("config.py").exists() else "__main__"
        yield importlib.import_module(f"stages.{main.parent.name}.{name}").Params


def validate(schema: type[P], values: dict[str, Any], stage: str | None = None) -> P:
    """Check plain values against a schema, whose context is `stage`; raises a UserError."""
    try:
        return schema.model_validate(values, context=stage)
    except ValidationError as error:
        raise UserError(_explain(schema, error.errors()[0])) from None


def _explain(schema: type[BaseModel], error: ErrorDetails) -> str:
    path = [str(part) for part in error["loc"]]
    key, value = f"{FILE}: {'.'.join(path[:2])}", error["input"]
    if error["type"] == "extra_forbidden":
        section = schema.model_fields[path[0]].annotation if len(path) > 1 else schema
        known = ", ".join(getattr(section, "model_fields", ())) or "none at all"
        return f"{key} is not a parameter; expected one of {known}. Remove or rename it."
    if error["type"] == "missing":
        return f"{key} is missing. Every parameter has a line there: add it back."
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if error["type"] == "model_type":
        expected = "a section with its keys"
    if isinstance(value, str) and expected in NUMBERS and re.fullmatch(r"[-+.\de]+", value):
        expected += "; write it without quotes"
    text = "the text " if isinstance(value, str) else ""
    return f"{key} is {text}{value!r:.80}; expected {expected}"
