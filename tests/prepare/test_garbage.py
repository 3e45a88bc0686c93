"""How often Python looks for garbage."""

import gc

import pytest

from stages.prepare import garbage


def test_it_is_looked_for_rarely_and_then_as_before() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(KeyError), garbage.collected_rarely():
        assert gc.get_threshold()[0] > before[0]
        assert gc.get_freeze_count() > frozen
        assert gc.isenabled()
        raise KeyError
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
