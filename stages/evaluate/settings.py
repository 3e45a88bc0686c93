"""The parameters of an evaluation."""

from typing import Annotated

from pydantic import Field

from stages.shared.core.params import Section


class Evaluate(Section):
    """`evaluate`: what is asked of each of the four models."""

    generate_rows: Annotated[int, Field(ge=0)]
    max_new_tokens: Annotated[int, Field(ge=1)]
    prompts: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]


class Params(Section):
    """What dvc.yaml declares for `evaluate`."""

    evaluate: Evaluate
