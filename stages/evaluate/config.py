"""The section `evaluate` of params.yaml."""

from typing import Annotated

from pydantic import Field

from stages.shared.core.params import Section


class Evaluate(Section):
    """Generation of replies."""

    generate_rows: Annotated[int, Field(ge=0, le=100_000)]
    max_new_tokens: Annotated[int, Field(ge=1, le=131_072)]
    prompts: Annotated[int, Field(ge=0, le=1000)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    evaluate: Evaluate
