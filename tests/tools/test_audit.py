"""The audit: what could not be looked up is no pass."""

import importlib.util
import json
from typing import Any

import pytest

from tests.test_contract import ROOT

spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci/audit.py")
assert spec is not None
assert spec.loader is not None
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

CLEAN = {"name": "a", "version": "1", "vulns": []}
KNOWN = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "line", "code"),
    [
        ([CLEAN, CLEAN], "2 packages looked up, 0 known vulnerabilities", 0),
        ([CLEAN, KNOWN], "b 2: PYSEC-1; fixed in 3", 1),
        ([CLEAN, SKIPPED], "NOT AUDITED: 1 of 2 packages could not be looked up on PyPI: c", 2),
        ([], "NOT AUDITED: all of all packages could not be looked up on PyPI", 2),
    ],
)
def test_audit_passes_only_what_was_looked_up(packages: list[Any], line: str, code: int) -> None:
    lines, got = audit.judge(json.dumps({"dependencies": packages}))
    assert (lines[0], got) == (line, code)


def test_audit_that_broke_off_does_not_pass() -> None:
    assert audit.judge("")[1] == 2
