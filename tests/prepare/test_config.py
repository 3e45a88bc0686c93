"""Parameters: refused by name when they are out of range."""

from typing import Any

import pytest

from stages.prepare.config import Params
from stages.shared.core import params
from stages.shared.core.errors import UserError
from tests.prepare.helpers import DEFAULTS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("format", "sharegpt"), ("template", "vicuna"), ("train_on", "user")),
        *(("max_length", 1), ("max_length", "512"), ("max_rows", 0), ("max_rejected", 1.5)),
        *(("eval_fraction", 0.0), ("eval_fraction", 1.0), ("seed", -1)),
    ],
)
def test_a_parameter_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"params.yaml: prepare.{key} is "):
        params.validate(Params, {"prepare": DEFAULTS | {key: value}})
