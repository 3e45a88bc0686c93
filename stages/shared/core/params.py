"""Parameters of params.yaml, checked against the schema of each stage."""

import errno
import importlib
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.shared.core import bounds, files
from stages.shared.core.command import quick_imports
from stages.shared.core.errors import UserError, lacks_memory, require_regular
from stages.shared.core.machine import machine

FILE = Path("params.yaml")
DEEPEST, MOST_VALUES = 8, 10_000  # levels and values of params.yaml
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
    Then the files that the stage depends on are verified.

    Raises:
        UserError: a key is unknown, missing, of a wrong type or out of range; or DVC cannot read
            the stage; or a dependency rotted.
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
        if lacks_memory(error) or getattr(error, "errno", None) == errno.EMFILE:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{stage}: DVC cannot read its stage here ({reason:.120}). Restore dvc.yaml or "
            "dvc.lock by git; a stage runs at the root of a clone."
        ) from None
    return mine


def read_file() -> dict[str, Any]:
    """All of params.yaml, as DVC reads it.

    Raises:
        UserError: it is no YAML, or a value is a date, which JSON cannot hold; or it nests or
            expands without end (anchors).
    """
    if not require_regular(FILE).exists():
        raise UserError(f"{FILE}: not there. Run this at the root of a clone of the repository.")
    try:
        with bounds.limited():
            whole = YAML(typ="safe").load(FILE)
    except (YAMLError, ValueError) as error:
        mark, problem = (getattr(error, f"problem{end}", None) for end in ("_mark", ""))
        place = f"{FILE}:{mark.line + 1}" if mark else FILE
        reason = " ".join(str(problem or error).split())
        raise UserError(f"{place}: is not YAML ({reason:.80}). Correct it there.") from None
    except (bounds.Exceeded, RecursionError):
        raise UserError(f"{FILE}: is nested too deeply, or too large. Write it plainly.") from None
    if not isinstance(whole, dict):
        raise UserError(f"{FILE}: has no sections. Restore it: git checkout {FILE}")
    waiting, seen = [(str(key), value, 1) for key, value in whole.items()], 0
    while waiting:
        key, value, depth = waiting.pop()
        seen += 1
        if depth > DEEPEST or seen > MOST_VALUES:
            raise UserError(f"{FILE}: {key:.40} has too many values. Look for an anchor (&, *).")
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{key}.{name}", one, depth + 1) for name, one in pairs]
        elif not isinstance(value, str | int | float | None):
            raise UserError(f"{FILE}: {key} is {value}, a {type(value).__name__}. Quote a text.")
    return whole


def check(whole: dict[str, Any], stage: str | None = None) -> None:
    """Check the sections of all stages, `stage` about to run; the first mistake is a UserError."""
    schemas = list(_schemas())
    known = dict.fromkeys(name for schema in schemas for name in schema.model_fields)
    for name in whole.keys() - known.keys():
        raise UserError(
            f"{FILE}: {name} is not a section; expected one of {', '.join(known)}. Remove it."
        )
    for schema in schemas:
        values = {name: whole[name] for name in schema.model_fields if name in whole}
        validate(schema, values, stage)


def _schemas() -> Iterator[type[BaseModel]]:
    """The schemas of all stages."""
    for path in sorted(Path(__file__).parents[2].glob("*/config.py")):
        yield importlib.import_module(f"stages.{path.parent.name}.config").Params


def validate(schema: type[P], values: dict[str, Any], stage: str | None = None) -> P:
    """Check plain values against a schema; the first mistake raises a UserError of one line.

    A validator that also reads outs finds in its context the `stage` that is about to run.
    """
    try:
        return schema.model_validate(values, context=stage)
    except ValidationError as error:
        raise UserError(_explain(schema, error.errors()[0])) from None


def _explain(schema: type[BaseModel], error: ErrorDetails) -> str:
    """One line: which key, its value, what was expected, what to do."""
    path = [str(part) for part in error["loc"]]
    key, found = ".".join(path[:2]), error["input"]
    if error["type"] == "extra_forbidden":
        known = _known_keys(schema, path)
        return (
            f"params.yaml: {key} is not a parameter; expected one of {known}. Remove or rename it."
        )
    if error["type"] == "missing":
        return f"params.yaml: {key} is missing. Every parameter has a line there: add it back."
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if error["type"] == "model_type":
        expected = "a section with its keys"
    line = f"params.yaml: {key} is {_show(found)}; expected {expected}"
    if isinstance(found, str) and _is_number(found):
        line += "; write it without quotes" if expected in NUMBERS else ""
    return line


def _known_keys(schema: type[BaseModel], path: list[str]) -> str:
    fields = schema.model_fields
    if len(path) > 1:
        section = fields[path[0]].annotation
        fields = getattr(section, "model_fields", fields)
    return ", ".join(fields) or "none at all"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def _show(value: Any) -> str:
    return f"the text {_SHORT.repr(value)}" if isinstance(value, str) else _SHORT.repr(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
