"""The parameters of a merge."""

from typing import Literal

from stages.shared.core.params import Section


class Merge(Section):
    """`merge`: what the adapter is merged onto, and what the sum is stored in."""

    onto: Literal["quantized", "original"]
    dtype: Literal["fp16", "bf16", "fp32"]


class Params(Section):
    """What dvc.yaml declares for `merge`."""

    merge: Merge
