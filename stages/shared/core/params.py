"""Parameters of params.yaml, checked against the schema of each stage."""

import importlib
import json
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.shared.core import bounds, files
from stages.shared.core.command import quick_imports
from stages.shared.core.errors import UserError, lacks_memory, require_regular
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
    """Read the sections that dvc.yaml declares for `stage` (`train`, `evaluate@base`).

    Through DVC, so that a stage cannot depend on a parameter that DVC does not know of. The other
    stages' sections are checked too: a mistake in one is told before the training, not after it.
    So are the files that the stage depends on. What is wrong is a UserError.
    """
    with quick_imports():  # half a second that the unit tests of a schema need not pay
        import dvc.api  # noqa: PLC0415

    check(read_file(), stage)
    machine()  # a wrong setting is told at the start, by stages that read none too
    try:
        values = dvc.api.params_show(stages=stage)
        mine = validate(schema, values, stage)
        files.verify_dependencies(stage)
    except UserError:
        raise
    except Exception as error:  # DVC's, and of the libraries that it reads by
        if lacks_memory(error) or (isinstance(error, OSError) and error.errno):
            raise  # of the disk or a limit: `command.run` tells of it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{stage}: DVC cannot read its stage here ({reason:.120}). Restore dvc.yaml or "
            "dvc.lock by git; a stage runs at the root of a clone."
        ) from None
    return mine


def read_file() -> dict[str, Any]:
    """All of params.yaml; a UserError where it is more than JSON can hold: a date, a loop."""
    if not require_regular(FILE).exists():
        raise UserError(f"{FILE}: not there. Run this at the root of a clone of the repository.")
    try:
        with bounds.limited(2):
            whole = YAML(typ="safe").load(FILE)
            length = len(json.dumps(whole, default=_refuse))
    except (YAMLError, ValueError, TypeError) as error:
        mark, problem = (getattr(error, f"problem{end}", None) for end in ("_mark", ""))
        place = f"{FILE}:{mark.line + 1}" if mark else FILE
        reason = " ".join(str(problem or error).split())
        raise UserError(f"{place}: is no plain YAML ({reason:.80}). Correct it.") from None
    except (bounds.Exceeded, RecursionError):
        length = LONGEST + 1
    if length > LONGEST:
        raise UserError(f"{FILE}: is nested or expands without end. Look for an anchor (&, *).")
    if not isinstance(whole, dict):
        raise UserError(f"{FILE}: has no sections. Restore it: git checkout {FILE}")
    return whole


def _refuse(value: object) -> NoReturn:
    raise UserError(f"{FILE}: {value} is a {type(value).__name__}. Quote it, if it is a text.")


def check(whole: dict[str, Any], stage: str | None = None) -> None:
    """Check the sections of all stages, `stage` about to run; the first mistake is a UserError."""
    schemas = list(_schemas())
    known = dict.fromkeys(name for schema in schemas for name in schema.model_fields)
    for name in whole.keys() - known.keys():
        what = f"is not a section; expected one of {', '.join(known)}"
        raise UserError(f"{FILE}: {name} {what}. Rename or remove it.")
    for schema in schemas:
        values = {name: whole[name] for name in schema.model_fields if name in whole}
        validate(schema, values, stage)


def _schemas() -> Iterator[type[BaseModel]]:
    """The schemas of all stages, in `config.py` or, of a few keys, in `__main__.py`."""
    for main in sorted(Path(__file__).parents[2].glob("*/__main__.py")):
        name = "config" if main.with_name("config.py").exists() else "__main__"
        yield importlib.import_module(f"stages.{main.parent.name}.{name}").Params


def validate(schema: type[P], values: dict[str, Any], stage: str | None = None) -> P:
    """Check plain values against a schema, whose context is `stage`; a mistake is a UserError."""
    try:
        return schema.model_validate(values, context=stage)
    except ValidationError as error:
        raise UserError(_explain(schema, error.errors()[0])) from None


def _explain(schema: type[BaseModel], error: ErrorDetails) -> str:
    """One line: which key, its value, what was expected, what to do."""
    path = [str(part) for part in error["loc"]]
    key, found = f"{FILE}: {'.'.join(path[:2])}", error["input"]
    if error["type"] == "extra_forbidden":
        section = schema.model_fields[path[0]].annotation if len(path) > 1 else schema
        known = ", ".join(getattr(section, "model_fields", ())) or "none at all"
        return f"{key} is not a parameter; expected one of {known}. Remove or rename it."
    if error["type"] == "missing":
        return f"{key} is missing. Every parameter has a line there: add it back."
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if error["type"] == "model_type":
        expected = "a section with its keys"
    if isinstance(found, str) and expected in NUMBERS and re.fullmatch(r"[-+.\de]+", found):
        expected += "; write it without quotes"
    text = "the text " if isinstance(found, str) else ""
    return f"{key} is {text}{_SHORT.repr(found)}; expected {expected}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80
