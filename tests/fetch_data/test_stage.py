"""The stage as a user runs it."""

from pathlib import Path

from tests import hub as hubs
from tests import workspace
from tests.fetch_data.helpers import JSONL


def test_a_failed_stage_leaves_the_last_data_alone(tmp_path: Path) -> None:
    space = workspace.make(tmp_path / "space", {"data.path": "mine.jsonl"})
    (space.root / "mine.jsonl").write_bytes(JSONL)
    assert space.stage("fetch_data").returncode == 0
    space.set_params({"data.source": "hub", "data.revision": hubs.COMMIT})
    with hubs.serve() as hub:
        hub.status = 500
        failed = space.stage("fetch_data", env=hub.env)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: {hub.url}: answered 500 Internal Server Error")
    assert failed.stderr.count("\n") == 1
    assert (space.root / "data/raw/train.jsonl").read_bytes() == JSONL
    assert [p.name for p in (space.root / "data").iterdir()] == ["raw"]
