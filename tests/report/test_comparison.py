"""Numbers as people read them, and the comparison of the four variants."""

import pytest

from stages.report import comparison, formats
from tests.report import sources as made

NB = "\N{NO-BREAK SPACE}"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (formats.number(1234.5, 1), "1,234.5"),
        (formats.number(-0.00001), "0.0000"),
        (formats.number(None), "–"),
        (formats.number(float("nan")), "–"),
        (formats.signed(0.25, 2), "+0.25"),
        (formats.signed(-0.25, 2), "−0.25"),
        (formats.signed(0.00001), "0.0000"),
        (formats.percent(0.625), f"62.5{NB}%"),
        (formats.points(0.125), "+12.5"),
        (formats.size(98_362_432), f"98.4{NB}MB"),
        (formats.size(16_000_000_000), f"16.00{NB}GB"),
        (formats.size(12), f"12{NB}B"),
        (formats.words("RTX_4090_24GiB"), f"RTX 4090 24{NB}GiB"),
        (formats.value(True), "yes"),
        (formats.value(4_884_480), "4,884,480"),
        (formats.value(1_000_000, "peak_memory_bytes"), f"1.0{NB}MB"),
        (formats.value(0.0000123), f"1.2{NB}×{NB}10⁻⁵"),
        (formats.scientific(0), "0"),
        (formats.yaml_value([None, False, "q_proj"]), "null, false, q_proj"),
        (formats.markdown("a|b *c*\n<d>\x1b"), r"a\|b \*c\* &lt;d&gt;\\x1b"),
    ],
)
def test_formatting(shown, expected):
    assert shown == expected


def test_changes_are_later_minus_earlier():
    table = comparison.metrics_table({v: made.metrics(v) for v in made.LOSS})
    changes = comparison.changes(table)
    assert list(changes["loss"]) == [0.125, -1.125, 0.0625]
    assert changes.loc["What training gained", "exact_match"] == 0.6875


def test_metrics_that_are_missing_have_no_change():
    table = comparison.metrics_table({v: {"loss": 1.0} for v in made.LOSS})
    assert comparison.changes(table)["exact_match"].isna().all()
    assert (comparison.noise(table) == 0).all(axis=None)


@pytest.mark.parametrize(
    ("metric", "change", "noise", "verdict"),
    [
        ("loss", -0.1, 0, "better"),
        ("loss", 0.1, 0, "worse"),
        ("exact_match", 0.1, 0, "better"),
        ("stop_rate", -0.1, 0, "worse"),
        ("stop_rate", -0.1, 0.2, ""),
        ("loss", 0.0005, 0, ""),
        ("loss", float("nan"), 0, ""),
    ],
)
def test_verdict(metric, change, noise, verdict):
    assert comparison.verdict(metric, change, noise) == verdict


def test_noise_is_twice_the_standard_error_of_a_difference():
    few = {"stop_rate": 0.5, "generated_rows": 64, "exact_match": 0.5, "answered_rows": 16}
    table = comparison.metrics_table({"base": few, "quantized": few | {"stop_rate": 0.6}})
    noise = comparison.noise(table.reindex(list(made.LOSS))).iloc[0]
    assert noise["stop_rate"] == pytest.approx(2 * (0.55 * 0.45 * 2 / 64) ** 0.5)
    assert noise["exact_match"] == pytest.approx(2 * (2 * 0.25 / 16) ** 0.5)
    assert noise["loss"] == 0
    one = {"exact_match": 0.0, "answered_rows": 1}  # no variance of their own, and no proof
    table = comparison.metrics_table({"base": one, "quantized": one | {"exact_match": 1.0}})
    assert comparison.noise(table.reindex(list(made.LOSS))).iloc[0]["exact_match"] > 1


def test_part_losses_are_of_several_sources_and_roles():
    one = {"by_source": {"a": {"loss": 1}, "b": {"loss": 2}}, "by_role": {"user": {"loss": 3}}}
    table = comparison.part_losses({"base": one, "merged": {}})
    assert table["base"].to_dict() == {"Source a": 1, "Source b": 2}
    assert table["merged"].isna().all()
    assert comparison.part_losses({"base": {}}).empty


def test_languages_without_rows_are_left_out():
    tables = comparison.language_tables({v: {"by_language": {"en": {"loss": 1}}} for v in "ab"})
    assert list(tables) == ["English"]
    assert tables["English"]["a"]["loss"] == 1


def answers(*rows: tuple[str, str, bool]) -> list[dict]:
    return [
        {"prompt": [{"role": "user", "content": q}], "answer": a, "correct": right}
        for q, a, right in rows
    ]


def test_answers_are_joined_by_prompt():
    base = answers(("a", "1", True), ("a", "2", True), ("b", "3", True))
    joined = comparison.join_answers({"base": base, "merged": answers(("b", "4", True))})
    texts = [{variant: a["answer"] for variant, a in prompt.items()} for prompt in joined]
    assert texts == [{"base": "1"}, {"base": "2"}, {"base": "3", "merged": "4"}]


def test_wrong_answers_of_the_merged_model_come_first():
    merged = answers(("a", "1", True), ("b", "2", False), ("c", "3", False), ("d", "4", False))
    prompts = comparison.select(comparison.join_answers({"merged": merged}), 2)
    assert [prompt["merged"]["prompt"][0]["content"] for prompt in prompts] == ["b", "c", "a"]
