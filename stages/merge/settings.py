"""The parameters of a merge."""

from typing import Literal

from stages.shared.params import Section


class Merge(Section):
    """`merge`: what the adapter is merged onto."""

    onto: Literal["quantized", "original"]


class Params(Section):
    """What dvc.yaml declares for `merge`."""

    merge: Merge
