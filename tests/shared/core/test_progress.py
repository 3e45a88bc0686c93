"""Garbage among what is imported is looked for neither meanwhile nor later."""

import gc

import pytest

from stages.shared.core import progress


@pytest.mark.parametrize("enabled", [True, False])
def test_quick_imports_freeze_objects_and_restore_the_collector(enabled: bool) -> None:
    before, frozen = gc.isenabled(), gc.get_freeze_count()
    (gc.enable if enabled else gc.disable)()
    try:
        with progress.quick_imports():
            assert not gc.isenabled()
            made: list[list[int]] = [[] for _ in range(1000)]
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() >= frozen + len(made)
        assert not any(one is made for one in gc.get_objects())
    finally:
        gc.unfreeze()
        (gc.enable if before else gc.disable)()
