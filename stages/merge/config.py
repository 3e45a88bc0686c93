"""The section `merge` of params.yaml."""

from typing import Literal

from stages.shared.core.params import Section


class Merge(Section):
    """Base weights and dtype of the merged model."""

    onto: Literal["quantized", "original"]
    dtype: Literal["fp16", "bf16", "fp32"]


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    merge: Merge
