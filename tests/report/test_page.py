"""The page and the card, from made-up outputs of the other stages."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from stages.report import charts, formatting, page, provenance, sources
from stages.shared.core.errors import UserError
from tests.report import sources as made
from tests.report.elements import Elements

ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def source_of(root: Path, **changes: Any) -> sources.Sources:
    return sources.read(made.write(root, **changes))


@pytest.fixture
def source(tmp_path):
    return source_of(tmp_path)


@pytest.fixture
def parsed(source):
    return Elements(page.html(source))


def test_the_headline_says_what_was_gained(parsed):
    assert "from 2.000 to 1.062 nats a token" in parsed.flat
    assert "2.000 → 1.000 → 1.062" in parsed.flat
    assert "12.5 % → 75.0 %" in parsed.flat.replace("\xa0", " ")
    assert "+62.5 points" in parsed.flat


def test_nothing_is_missing_where_everything_is_there(parsed):
    assert "–" not in parsed.flat.split("Training, data and merge")[0]


def test_three_differences_stand_under_their_names(parsed):
    for line in (
        "What quantization cost quantized − base +0.1250",
        "What training gained adapter − quantized −1.1250",
        "What merging cost merged − adapter +0.0625",
    ):
        assert line in parsed.flat


def test_languages_stand_apart(parsed):
    assert "English" in parsed.flat
    assert "Other languages" in parsed.flat


def test_every_parameter_is_shown(parsed, source):
    for section in source.parameters.values():
        for key in section:
            assert f" {key} " in parsed.text


def test_parameters_are_read_as_dvc_reads_them(tmp_path):
    """By YAML 1.2: the stages get 10 and 0.005, where YAML 1.1 has an octal 8 and a text."""
    made.write(tmp_path)
    path = tmp_path / "params.yaml"
    text = path.read_text().replace("r: 16 ", "r: 010 ").replace("1.0e-3", "5e-3")
    path.write_text(text)
    found = sources.read(tmp_path).parameters
    assert (found["lora"]["r"], found["train"]["learning_rate"]) == (10, 0.005)


def test_the_page_loads_nothing(parsed):
    assert not {tag for tag, _ in parsed.tags} & {"script", "iframe", "object", "embed", "base"}
    loading = [
        value
        for _, attributes in parsed.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    ]
    assert all(value and value.startswith(("#", "data:,")) for value in loading)


def test_the_style_loads_nothing(source):
    assert "@import" not in page.html(source)
    assert not re.search(r"url\((?!#)", page.html(source))


def test_text_from_data_model_and_parameters_is_escaped(tmp_path):
    spoiled = made.answer("base", text=ATTACK) | {
        "prompt": [{"role": ATTACK, "content": ATTACK}],
        "reference": ATTACK,
        "expected": ATTACK,
    }
    source = source_of(tmp_path, answers_base={"answers": [spoiled]}, plan={"note": ATTACK})
    parameters = source.parameters | {
        "model": {"source": "path", "name": ATTACK, "revision": ATTACK},
        ATTACK: {ATTACK: ATTACK},
    }
    source = replace(source, parameters=parameters, environment={"device": ATTACK})
    parsed = Elements(page.html(source))
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert not [1 for _, attributes in parsed.tags if "onerror" in attributes]
    assert parsed.text.count('alert("x")') > 8
    card = page.model_card(source).split("---", 2)[2]
    assert "<script" not in card
    assert "<img" not in card


def test_a_name_cannot_break_out_of_the_front_matter(source):
    name = "a\n---\nlicense: mit"
    source = replace(source, parameters=source.parameters | {"model": {"source": "hub"}})
    source.parameters["model"]["name"] = name
    _, head, _ = re.split(r"^---$", page.model_card(source), maxsplit=2, flags=re.M)
    assert yaml.safe_load(head)["base_model"] == name


def test_exact_match_of_data_without_answers_is_a_dash(tmp_path):
    metrics = {f"evaluate_{v}": made.metrics(v) | {"exact_match": None} for v in made.LOSS}
    answers = {
        f"answers_{v}": {"answers": [made.answer(v) | {"correct": None, "expected": None}]}
        for v in made.LOSS
    }
    source = source_of(tmp_path, **metrics, **answers)
    parsed = Elements(page.html(source))
    assert "– → –" in parsed.flat
    assert "exact answers" not in parsed.flat
    assert "wrong" not in parsed.flat
    assert "exact match  – → – (– points)" in page.summary(source)
    assert "| merged | 1.0625 | 2.894 | 0.5312 | – |" in page.model_card(source)


def test_keys_that_are_missing_are_dashes_and_no_error(tmp_path):
    empty: dict[str, Any] = {name: {} for name in ("prepare", "quantize", "train", "merge", "plan")}
    empty |= {f"evaluate_{v}": {} for v in made.LOSS} | {f"answers_{v}": {} for v in made.LOSS}
    source = source_of(tmp_path, **empty)
    assert "No prompts were answered." in page.html(source)
    assert "–" in page.model_card(source)
    assert "–" in page.summary(source)


def test_the_same_sources_give_the_same_bytes(source):
    assert page.html(source) == page.html(source)
    assert page.model_card(source) == page.model_card(source)


def test_a_missing_or_broken_file_is_named(tmp_path):
    made.write(tmp_path)
    (tmp_path / "reports/merge.json").write_text("[]")
    with pytest.raises(UserError, match=r"merge\.json: cannot be read \(a list where"):
        sources.read(tmp_path)
    (tmp_path / "reports/merge.json").unlink()
    with pytest.raises(UserError, match=r"merge\.json: not found. Run `dvc repro`"):
        sources.read(tmp_path)


def test_the_card_names_the_base_model_and_its_limits(source):
    card = page.model_card(source)
    _, head, body = re.split(r"^---$", card, maxsplit=2, flags=re.M)
    assert yaml.safe_load(head) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert r"in 4 bits (Q4\_1)" in body
    assert "| merged | 1.0625 | 2.894 | 0.5312 | 75.0\xa0% | 100.0\xa0% |" in body


def test_the_licence_of_another_model_is_not_made_up(source):
    model = {"source": "hub", "name": "somebody/some-model", "revision": "0" * 40}
    card = page.model_card(replace(source, parameters=source.parameters | {"model": model}))
    assert 'base_model: "somebody/some-model"' in card
    assert "license:" not in card
    assert "Q4" not in card


def test_two_pictures_share_no_id(source):
    ids = re.findall(r'\bid="([^"]+)"', page.html(source))
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("content", ["", "<svg><script/></svg>", '<svg onload="x()"></svg>'])
def test_a_picture_that_could_act_is_refused(content):
    with pytest.raises(UserError, match=r"reports/plan\.svg: not a plain chart"):
        charts.inline(content, "plan", "label")


def test_history_has_points_where_it_was_measured(source):
    assert charts._points(source.history, "eval_loss").to_dict() == {0: 2.125, 2: 1.0}
    svg = charts.training_history(source.history, 2)
    for text in ("kept: step 2", "learning rate", "gradient norm"):
        assert text in svg


@pytest.mark.parametrize(("evaluations", "lines"), [(2, 0), (3, 1)])
def test_few_held_out_points_are_not_joined(evaluations, lines):
    history = pd.DataFrame({"step": range(3), "eval_loss": [2.0, 1.0, 0.5]})[:evaluations]
    assert charts.training_history(history, None).count("stroke-dasharray: 1.5,2.475") == 2 * lines


def test_the_terminal_ends_with_five_lines(source):
    lines = page.summary(source).splitlines()
    assert len(lines) == 5
    assert "reports/report.html" in lines[0]
    assert "2.0000 → 1.0625 nats a token, base → tuned (−0.9375)" in lines[1]
    assert "12.5\xa0% → 75.0\xa0% (+62.5 points)" in lines[2]
    assert "99.76\xa0%" in lines[4]
    assert "1.2\xa0×\xa010⁻⁵" in lines[4]


@pytest.mark.parametrize(
    ("best_step", "said"), [(2, "QLoRA on 16 of 1,500 conv"), (188, "QLoRA on 1,500 conv")]
)
def test_it_says_how_many_conversations_were_learnt(tmp_path, best_step, said):
    train = made.contents()["reports/train.json"] | {"best_step": best_step}
    source = source_of(tmp_path, train=train)
    assert said in Elements(page.html(source)).flat
    assert said in " ".join(page.model_card(source).split())


@pytest.mark.parametrize("generated", [64, 0])
def test_it_says_of_how_many_replies_a_share_is(tmp_path, generated):
    changed = {"generated_rows": generated}
    metrics = {f"evaluate_{v}": made.metrics(v) | changed for v in made.LOSS}
    source = source_of(tmp_path, **metrics)
    said = "of 64 generated replies, exact match of the 40 among them whose answer is known"
    assert (said in Elements(page.html(source)).flat) == bool(generated)
    card = " ".join(page.model_card(source).split())
    assert ("64 generated replies, exact match on the 40 among them" in card) == bool(generated)
    assert "0 generated replies" not in card


def test_policy_forbids_scripts_and_loading(parsed):
    (policy,) = [a["content"] for tag, a in parsed.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_control_characters_are_spelled_out(tmp_path):
    spoiled = {"answers": [made.answer("base", text="\x1b[2J\u202e\x00")]}
    page_text = page.html(source_of(tmp_path, answers_base=spoiled))
    assert r"\x1b[2J\u202e\x00" in page_text
    assert not formatting.CONTROL.search(page_text)


def test_narrow_layout_has_a_heading_for_every_cell(source):
    tables = re.findall(r'<table class="wide">.*?</table>', page.html(source), flags=re.S)
    assert len(tables) == 6
    for table in tables:
        heads = re.findall(r"<th>([^<]*)</th>", table.partition("</thead>")[0])[1:]
        assert heads == re.findall(r'data-label="([^"]*)"', table)[: len(heads)]
        assert table.count("<td") == table.count("<td data-label=")


def test_provenance_names_commit_hashes_and_versions(parsed):
    for text in ("Report written 20", "Commit ", "Base model, md5 ", "torch 2.13.0+cpu"):
        assert text in parsed.flat


def test_commit_tells_of_changes_but_for_those_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert provenance._commit() is None
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for name in ("params.yaml", "dvc.lock", "reports/train.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "."]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "dvc.lock").write_text("b")
    (tmp_path / "reports/train.json").write_text("b")
    assert re.fullmatch("[0-9a-f]{40}", provenance._commit() or "")
    (tmp_path / "params.yaml").write_text("b")
    assert str(provenance._commit()).endswith(" with uncommitted changes in params.yaml")


@pytest.mark.parametrize(
    ("section", "key", "label"),
    [
        ("train", "best_step", "Kept step"),
        ("prepare", "train.languages.de", "Training conversations, de"),
        ("prepare", "fields.unknown_one", "Fields, unknown one"),
    ],
)
def test_keys_have_labels(section, key, label):
    assert page.label(section, key) == (label, "")


def test_memory_table_leads_with_the_peak_and_what_fits(parsed):
    assert "Technique peak, MB T4 16 GiB qlora nf4 0.0 ✓" in parsed.flat
