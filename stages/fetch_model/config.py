"""The section `model` of params.yaml."""

from typing import Literal

from pydantic import Field

from stages.shared.core.params import Section


class Model(Section):
    """Source of the base model."""

    source: Literal["pypi", "hub", "path"]
    name: str = Field(min_length=1)
    revision: str | None
    file: str | None
    sha256: str | None


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    model: Model
