"""The layout of the pipeline's picture."""

import pytest
import yaml

from stages.report import graph, pipeline
from stages.report.pipeline import Stage
from tests.report.sources import ROOT


def chain(**needs: list[str]) -> list[Stage]:
    return [Stage(name, "", above, [name]) for name, above in needs.items()]


def test_a_foreach_is_written_out_with_its_own_paths():
    written = {
        "stages": {
            "score": {
                "foreach": {"a": {"model": "models/a"}, "b": {"model": "models/b"}},
                "do": {"deps": ["${item.model}", "${data.path}"], "metrics": [{"${key}.json": {}}]},
            },
            "each": {"foreach": ["x"], "do": {"desc": "d", "outs": ["${item}.txt"]}},
        }
    }
    assert pipeline.stages(written) == [
        Stage("score@a", "", ["models/a", "${data.path}"], ["a.json"]),
        Stage("score@b", "", ["models/b", "${data.path}"], ["b.json"]),
        Stage("each@x", "d", [], ["x.txt"]),
    ]


@pytest.mark.parametrize(
    ("dep", "out", "waits"),
    [
        ("models/base", "models/base", True),
        ("models/base/config.json", "models/base", True),
        ("data", "data/raw", True),
        ("models/base2", "models/base", False),
    ],
)
def test_a_stage_waits_for_what_it_reads_in_part_or_whole(dep, out, waits):
    found = [Stage("first", "", [], [out]), Stage("second", "", [dep], [])]
    assert pipeline.edges(found)["second"] == ({"first"} if waits else set())


def test_a_dependency_that_follows_from_others_is_left_out():
    needs = pipeline.edges(chain(a=[], b=["a"], c=["a", "b"]))
    assert pipeline.reduced(needs) == {"a": set(), "b": {"a"}, "c": {"b"}}


def test_stages_stand_as_low_as_what_follows_allows():
    needs = pipeline.edges(chain(a=[], side=["a"], b=["a"], c=["b"], end=["c", "side"]))
    assert graph.rows(needs) == [["a"], ["b"], ["side", "c"], ["end"]]


def test_boxes_do_not_overlap_and_lines_go_down():
    drawing = graph.draw(pipeline.stages(yaml.safe_load((ROOT / "dvc.yaml").read_text())))
    assert len(drawing.boxes) == 12
    for box in drawing.boxes:
        assert 0 <= box.x <= drawing.width - graph.BOX_WIDTH
        assert 0 <= box.y <= drawing.height - graph.BOX_HEIGHT
        same_row = [b for b in drawing.boxes if b.y == box.y and b is not box]
        assert all(abs(b.x - box.x) >= graph.BOX_WIDTH for b in same_row)
    assert {line.arrow for line in drawing.paths} == {True, False}


def test_an_empty_pipeline_is_an_empty_drawing():
    assert graph.draw([]).boxes == []
