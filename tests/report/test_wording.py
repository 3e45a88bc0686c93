"""Numbers as people read them."""

import pytest

from stages.report import wording
from stages.report.comparison import (
    by_language,
    difference,
    differences,
    noise,
    prompts,
    verdict,
)
from tests.report import sources as made

NB = "\N{NO-BREAK SPACE}"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (wording.number(1234.5, 1), "1,234.5"),
        (wording.number(-0.5, 2), "−0.50"),
        (wording.number(-0.00001), "0.0000"),
        (wording.number(None), "–"),
        (wording.signed(0.25, 2), "+0.25"),
        (wording.signed(-0.25, 2), "−0.25"),
        (wording.signed(0.00001), "0.0000"),
        (wording.percent(0.625), f"62.5{NB}%"),
        (wording.percent(None), "–"),
        (wording.points(0.625), "+62.5"),
        (wording.points(None), "–"),
        (wording.size(98_362_432), f"98.4{NB}MB"),
        (wording.size(16_000_000_000), f"16.00{NB}GB"),
        (wording.size(12), f"12{NB}B"),
        (wording.in_unit(538_060_032, "MB"), "538.1"),
        (wording.common_unit([112_000_000_000]), "GB"),
        (wording.common_unit([]), "MB"),
        (wording.value(True), "yes"),
        (wording.value(4_884_480), "4,884,480"),
        (wording.value(1_000_000, "peak_memory_bytes"), f"1.0{NB}MB"),
        (wording.value(0.0000123), f"1.2{NB}×{NB}10⁻⁵"),
        (wording.value(["a", 1]), "a, 1"),
        (wording.scientific(0), "0"),
        (wording.scientific(123_456.0), f"1.2{NB}×{NB}10⁵"),
        (wording.scientific(1.0), f"1.0{NB}×{NB}10⁰"),
        (wording.label("train.peak_memory_bytes"), "train peak memory"),
        (wording.label("bytes"), "bytes"),
        (wording.yaml_value(None), "null"),
        (wording.yaml_value(False), "false"),
        (wording.yaml_value(["q_proj", "v_proj"]), "q_proj, v_proj"),
        (wording.markdown("a|b *c*\n<d>"), r"a\|b \*c\* &lt;d&gt;"),
    ],
)
def test_wording(shown, expected):
    assert shown == expected


def test_nested_figures_become_dotted_keys():
    assert wording.flat({"a": {"b": 1, "c": None}, "d": [2]}) == [
        ("a.b", 1),
        ("a.c", None),
        ("d", [2]),
    ]


def test_differences_are_later_minus_earlier():
    evaluations = {variant: made.metrics(variant) for variant in made.LOSS}
    cost, gained, merging = differences(evaluations)
    assert (cost.later, cost.earlier, cost.values["loss"]) == ("quantized", "base", 0.125)
    assert (gained.values["loss"], gained.values["exact_match"]) == (-1.125, 0.6875)
    assert merging.values["loss"] == 0.0625
    assert difference(None, 1.0) is None


def test_better_is_down_for_a_loss_and_up_for_a_rate():
    assert verdict("loss", -0.1) == verdict("exact_match", 0.1) == "better"
    assert verdict("loss", 0.1) == verdict("stop_rate", -0.1) == "worse"
    assert verdict("loss", 0.0005) == verdict("loss", None) == ""


def test_a_share_of_few_replies_is_coloured_only_where_chance_does_not_explain_it():
    few = {"stop_rate": 0.5, "generated_rows": 64, "exact_match": 0.5, "answered_rows": 16}
    more = few | {"stop_rate": 0.6}
    assert noise("stop_rate", few, more) == pytest.approx(2 * (0.25 / 64 + 0.24 / 64) ** 0.5)
    assert noise("exact_match", few, few) == pytest.approx(2 * (2 * 0.25 / 16) ** 0.5)
    assert noise("loss", few, more) == noise("stop_rate", {}, {"stop_rate": None}) == 0.0
    assert verdict("stop_rate", 0.1, noise("stop_rate", few, more)) == ""
    assert verdict("stop_rate", 0.2, noise("stop_rate", few, more)) == "better"


def test_a_language_without_rows_is_left_out():
    one = {v: {"by_language": {"en": {"loss": 1.0}}} for v in made.LOSS}
    assert [language for language, _ in by_language(one)] == ["English"]


def test_an_answer_never_stands_beside_another_question():
    def asked(question: str, text: str) -> dict:
        return {"prompt": [{"role": "user", "content": question}], "answer": text}

    found = prompts(
        {"base": [asked("a", "1"), asked("a", "2"), asked("b", "3")], "merged": [asked("b", "4")]}
    )
    assert [p.answers["base"]["answer"] for p in found if p.answers["base"]] == ["1", "2", "3"]
    assert [p.answers["merged"] and p.answers["merged"]["answer"] for p in found] == [
        None,
        None,
        "4",
    ]
