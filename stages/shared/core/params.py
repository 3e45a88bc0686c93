"""Parameters: what dvc.yaml declares for a stage, checked against the stage's own schema.

A schema lives in its stage. Here is only what every schema shares: that it is strict, and that a
mistake in params.yaml is told in one line.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML

from stages.shared.core import progress
from stages.shared.core.errors import UserError

FILE = Path("params.yaml")
NUMBERS = ("a valid number", "a valid integer")  # as pydantic calls them


class Section(BaseModel):
    """A section that the stage owns: frozen, strict types, finite numbers, nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class BorrowedSection(BaseModel):
    """A section that another stage owns: only the keys read here; the owner checks the rest."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


P = TypeVar("P", bound=BaseModel)


def load(schema: type[P], stage: str) -> P:
    """Read what dvc.yaml declares for `stage` (`train`, `evaluate@base`) from params.yaml.

    A stage sees only the sections that it declares, so it cannot depend on a parameter that DVC
    does not know of. But a mistake in what the stages after it declare is told here too: it would
    be a pity to hear of it when the training is over. Nothing that is written depends on that.

    Args:
        schema: a model with one field a section.
        stage: the stage's name in dvc.yaml.

    Raises:
        UserError: a key is unknown, missing, of a wrong type or out of range; or DVC cannot read
            any.
    """
    with progress.quick_imports():  # half a second that the unit tests of a schema need not pay
        import dvc.api  # noqa: PLC0415
        from dvc.exceptions import DvcException  # noqa: PLC0415

    try:
        values = dvc.api.params_show(stages=stage)
    except DvcException as error:
        raise UserError(
            f"params.yaml: DVC cannot read what {stage} declares ({error}); expected a clone of "
            "the repository, its dvc.yaml and params.yaml in UTF-8; run it in one, mend the file"
        ) from None
    mine = validate(schema, values)
    whole = YAML(typ="safe").load(FILE)  # as DVC reads it
    for other in _schemas():
        validate(other, {name: whole[name] for name in other.model_fields if name in whole})
    return mine


def _schemas() -> Iterator[type[BaseModel]]:
    """Of every stage that keeps its parameters in a module of their own."""
    stages = Path(__file__).parents[2]
    for path in sorted([*stages.glob("*/config.py"), *stages.glob("*/settings.py")]):
        yield importlib.import_module(f"stages.{path.parent.name}.{path.stem}").Params


def validate(schema: type[P], values: dict[str, Any]) -> P:
    """Check plain values against a schema, the first mistake told in one line.

    Raises:
        UserError: as `load` does.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(schema, error.errors()[0])) from None


def _explain(schema: type[BaseModel], error: ErrorDetails) -> str:
    """One line for one mistake: which key, what was found, what was expected, what to do."""
    path = [str(part) for part in error["loc"]]
    key, found = ".".join(path[:2]), error["input"]
    if error["type"] == "extra_forbidden":
        known = _known_keys(schema, path)
        return (
            f"params.yaml: {key} is not a parameter; expected one of {known}; remove or rename it"
        )
    if error["type"] == "missing":
        return f"params.yaml: {key} is missing; every parameter has a line there; add it back"
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


def _show(value: Any) -> str:
    return f"the text {value!r}" if isinstance(value, str) else repr(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
