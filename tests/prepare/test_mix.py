"""Several sources: what a row remembers, what is held out, and the mixture that is drawn."""

import json
from typing import Any

import numpy as np
import pytest

from stages.prepare.splitting import draw
from stages.shared.core.errors import UserError
from tests.prepare.helpers import Stage, row

MATHS = [row(f"what is two plus {i}", str(2 + i)) for i in range(20)]
CODE = [row(f"code {i}", "four four four four") for i in range(20)]


def write(stage: Stage, **sources: tuple[list[Any], list[Any]]) -> None:
    """Write what `fetch_data` leaves of sources: rows of train and of eval."""
    stage.raw.mkdir(exist_ok=True)
    parts: list[dict[str, Any]] = []
    for at, split in enumerate(("train", "eval")):
        lines: list[str] = []
        for name, both in sorted(sources.items(), key=lambda item: bool(item[1][1])):
            if rows := both[at]:
                parts.append({"split": split, "name": f"{name}.jsonl", "source": name})
                parts[-1] |= {"first_line": len(lines) + 1, "counted_in": "line"}
                lines += map(json.dumps, rows)
        if lines:
            (stage.raw / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (stage.raw / "source.json").write_text(json.dumps({"files": parts}), encoding="utf-8")


def sources_of(stage: Stage, split: str) -> dict[str, int]:
    names = [one["source"] for one in stage.rows(split)]
    return {name: names.count(name) for name in sorted({*names})}


def test_rows_and_figures_know_their_source(stage: Stage) -> None:
    write(stage, maths=(MATHS, []), code=([*CODE, MATHS[0], {"text": "### Human: a"}], []))
    figures = stage.run(max_rejected=0.1)
    assert (figures["duplicates"], figures["rejected"], "mix" in figures) == (1, 1, False)
    [rejected] = stage.rejected()
    assert (rejected["file"], rejected["line"]) == ("code.jsonl", 22)
    for split in ("train", "eval"):
        by_source = figures[split]["by_source"]
        counts = {name: one["conversations"] for name, one in by_source.items()}
        assert counts == sources_of(stage, split)
        for name in ("conversations", "tokens", "supervised_tokens"):
            assert sum(one[name] for one in by_source.values()) == figures[split][name]


def test_one_source_has_no_name(stage: Stage) -> None:
    figures = stage.prepare(MATHS)
    assert {one["source"] for one in stage.rows("train")} == {None}
    assert "by_source" not in figures["train"]


def test_nothing_leaks_between_sources(stage: Stage) -> None:
    """One holds out its own rows; of the other, the rows that the seed holds out."""
    stage.prepare(MATHS)
    held_out = [
        one for one in MATHS if one["text"][11:].partition("#")[0] in stage.questions("eval")
    ]
    assert held_out
    changed = [row(one["text"][11:].partition("#")[0], "five") for one in held_out]
    write(stage, maths=([*MATHS, CODE[0]], []), code=([*CODE[1:], *changed], [CODE[0], MATHS[0]]))
    figures = stage.run()
    assert not stage.questions("train") & stage.questions("eval")
    assert figures["leaked"] + figures["duplicates"] == len(changed) + 2  # MATHS[0], CODE[0] twice
    assert figures["leaked"] >= len(changed)
    assert sources_of(stage, "eval")["code"] == 2
    assert {one["source"] for one in stage.rows("eval")} == {"code", "maths"}


def test_a_mixture_has_its_shares(stage: Stage) -> None:
    write(stage, maths=(MATHS, []), code=(CODE, []))
    whole = stage.run()
    held_out, everything = stage.rows("eval"), {one["text"] for one in stage.rows("train")}
    figures = stage.run(mix={"maths": 0.5, "code": 0.5})
    found = figures["train"]["by_source"]
    maths, code = (found[name]["supervised_tokens"] for name in ("maths", "code"))
    assert abs(maths - code) <= 5
    assert found["maths"] == whole["train"]["by_source"]["maths"]  # the scarcer one, whole
    assert figures["mix"]["code"]["of"] == whole["train"]["by_source"]["code"]["conversations"]
    assert figures["mix"]["code"]["conversations"] == found["code"]["conversations"]
    assert stage.rows("eval") == held_out
    first = [one["text"] for one in stage.rows("train")]
    assert len({*first}) == len(first)
    assert {*first} < everything
    stage.run(mix={"maths": 1, "code": 1})
    assert [one["text"] for one in stage.rows("train")] == first
    figures = stage.run(mix={"maths": 0.5, "code": 0.5}, max_rows=8)
    assert figures["train"]["conversations"] == 8
    assert {*(one["text"] for one in stage.rows("train"))} < {*first}
    stage.run(mix={"maths": 0, "code": 2})
    assert sources_of(stage, "train").keys() == {"code"}
    assert not [*stage.out.glob("*.partial")]


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"maths": 1.0}, "prepare.mix is {'maths': 1.0}; the sources are code, maths. Give each"),
        ({"maths": 0, "code": 0}, "Give each a weight"),
        ({"maths": 1, "code": 1}, "gives code the weight 1.0; it has no conversation for training"),
        ({"maths": 1, "code": 1e-6}, "code the weight 1e-06; too little for a conversation. Rai"),
    ],
)
def test_a_mixture_that_cannot_be(stage: Stage, mix: dict[str, float], message: str) -> None:
    code = CODE if "too little" in message else [{"text": "### Human: a"}]
    write(stage, maths=(MATHS, []), code=(code, []))
    with pytest.raises(UserError) as error:
        stage.run(mix=mix, max_rejected=0.1)
    assert message in str(error.value)
    with pytest.raises(UserError, match=r"but data\.path is one source"):
        stage.prepare(MATHS, mix={"maths": 1.0})


@pytest.mark.parametrize("limit", [None, 1000])
def test_shares_are_exact_to_a_conversation(limit: int | None) -> None:
    generator = np.random.default_rng(0)
    tokens, sources = generator.integers(1, 500, 9000), generator.integers(0, 3, 9000)
    for weights in ([1.0, 1.0, 1.0], [0.7, 0.2, 0.1], [0.0, 3.0, 1.0]):
        drawn = draw(tokens, sources, weights, 1, limit)
        sums = np.array([tokens[drawn & (sources == i)].sum() for i in range(3)])
        expected = sums.sum() * np.array(weights) / sum(weights)
        assert np.abs(sums - expected).max() <= 500
        assert limit is None or limit - 3 <= drawn.sum() <= limit
        assert limit is not None or any(drawn[sources == i].all() for i in range(3))
        assert (drawn == draw(tokens, sources, weights, 1, limit)).all()
        assert (drawn != draw(tokens, sources, weights, 2, limit)).any()
