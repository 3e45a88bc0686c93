"""What a change of rank costs beside what it needs."""

from benchmarks import rank_change


def test_starting_counts_as_beside_what_is_needed():
    commands = [
        ("stages.train", 60.0),
        ("stages.merge", 24.0),
        ("stages.evaluate", 14.0),
        ("stages.evaluate", 14.0),
        ("stages.report", 3.0),
    ]
    start = {"stages.train": 5.0, "stages.merge": 4.0, "stages.evaluate": 4.0}
    text = rank_change.table(120.0, commands, start)
    assert "took 95.0 s once they had started; everything else is 26.3% more" in text
    assert "| `stages.report` | 3.0 |  |" in text
