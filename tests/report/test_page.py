"""The page and the model card, from made-up outputs of the other stages."""

import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from stages.report import page, sources
from stages.shared.core.display import visible
from stages.shared.core.errors import UserError
from tests.report import sources as made

ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)>'
LOADING = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")


class Elements(HTMLParser):
    """Tags with their attributes, and the text between them on one line."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._parts: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self._parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._parts.append(data)


def source_of(root: Path, **changes: Any) -> sources.Sources:
    return sources.read(made.write(root, **changes))


@pytest.fixture
def source(tmp_path):
    return source_of(tmp_path)


@pytest.fixture
def parsed(source):
    return Elements(page.html(source))


@pytest.mark.parametrize(
    "text",
    [
        "from 2.000 to 1.062 nats a token",
        "2.000 → 1.000 → 1.062",
        "12.5 % → 75.0 % +62.5 points",
        "What quantization cost quantized − base +0.1250",
        "What training gained adapter − quantized −1.1250",
        "What merging cost merged − adapter +0.0625",
        "English Model",
        "Other languages Model",
        "Role user 1.5000 1.5000 1.5000 1.5000",
        "QLoRA on 16 of 1,500 conversations",
        "of 64 generated replies, exact match of the 40 among them whose answer is known",
        "qlora nf4 T4 16 GiB 0.0",
        "exported gguf-q8_0 1.0628 2.894 0.5300 – – 500",
        "on the first 500 tokens, where the merged model's loss is 1.0625",
        "144.8 MB and agrees with the merged model in 99.75 % of the most likely tokens",
        "Report written 20",
        "torch 2.13.0+cpu",
    ],
)
def test_page_says(parsed, text):
    assert text in parsed.text


def test_page_counts_rows_and_known_answers(source):
    source.prepare["train"]["rows"] = 1600
    [answer] = source.answers["merged"]
    source.answers["merged"].extend(answer | {"correct": correct} for correct in (False, None))
    text = Elements(page.html(source)).text
    assert "QLoRA on 16 of 1,600 rows of 1,500 conversations" in text
    assert "Of 2 prompts whose answer is known the merged model answers 1 wrongly" in text


def test_page_has_no_dash_where_every_value_is_there(parsed):
    before, _, after = parsed.text.split("Training, data and merge")[0].partition("0.5300 – –")
    assert "–" not in before + after


def test_page_shows_every_parameter(parsed, source):
    for section in source.parameters.values():
        for key in section:
            assert f" {key} " in parsed.text


def test_page_loads_and_runs_nothing(parsed, source):
    assert not {tag for tag, _ in parsed.tags} & {"script", "iframe", "object", "embed", "base"}
    loading = [a[name] for _, a in parsed.tags for name in LOADING if name in a]
    assert all(value and value.startswith(("#", "data:,")) for value in loading)
    assert not re.search(r"@import|url\((?!#)", page.html(source))
    (policy,) = [a["content"] for _, a in parsed.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_page_and_card_escape_foreign_text(tmp_path):
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


def test_page_spells_out_control_characters(tmp_path):
    spoiled = {"answers": [made.answer("base", text="\x1b[2J\u202e\x00")]}
    html = page.html(source_of(tmp_path, answers_base=spoiled))
    assert r"\x1b[2J\u202e\x00" in html
    assert visible(html) == html


def test_narrow_layout_has_a_heading_for_every_cell(source):
    tables = re.findall(r'<table class="wide">.*?</table>', page.html(source), flags=re.S)
    assert len(tables) == 6
    for table in tables:
        heads = re.findall(r"<th>([^<]*)</th>", table.partition("</thead>")[0])[1:]
        assert heads == re.findall(r'data-label="([^"]*)"', table)[: len(heads)]
        assert table.count("<td") == table.count("<td data-label=")


def test_missing_answers_and_keys_are_dashes(tmp_path):
    unanswered = {f"evaluate_{v}": made.metrics(v) | {"exact_match": None} for v in made.LOSS}
    source = source_of(tmp_path / "unanswered", **unanswered)
    parsed = Elements(page.html(source))
    assert "– → –" in parsed.text
    assert "exact answers" not in parsed.text
    assert "exact match  – → – (– points)" in page.summary(source)
    assert "| merged | 1.0625 | 2.894 | 0.5312 | – |" in page.model_card(source)
    empty: dict[str, Any] = {name: {} for name in ("prepare", "quantize", "train", "merge", "plan")}
    empty |= {f"evaluate_{v}": {} for v in made.LOSS} | {f"answers_{v}": {} for v in made.LOSS}
    source = source_of(tmp_path / "empty", **empty)
    assert "No prompts were answered." in page.html(source)
    assert "–" in page.model_card(source)
    assert "–" in page.summary(source)


def test_missing_or_broken_file_is_named(tmp_path):
    made.write(tmp_path)
    (tmp_path / "reports/merge.json").write_text("[]")
    with pytest.raises(
        UserError, match=r"merge\.json: cannot be read \(.*list instead of an object"
    ):
        sources.read(tmp_path)
    (tmp_path / "reports/merge.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"merge\.json"):
        sources.read(tmp_path)


def test_parameters_are_read_as_dvc_reads_them(tmp_path):
    """By YAML 1.2: the stages get 10 and 0.005, where YAML 1.1 has an octal 8 and a text."""
    path = made.write(tmp_path) / "params.yaml"
    path.write_text(path.read_text().replace("r: 16 ", "r: 010 ").replace("1.0e-3", "5e-3"))
    parameters = sources.read(tmp_path).parameters
    assert (parameters["lora"]["r"], parameters["train"]["learning_rate"]) == (10, 0.005)


def test_card_names_the_default_model_and_its_limits(source):
    _, head, body = re.split(r"^---$", page.model_card(source), maxsplit=2, flags=re.M)
    assert yaml.safe_load(head) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert r"in 4 bits (Q4\_1)" in body
    assert "| merged | 1.0625 | 2.894 | 0.5312 | 75.0\xa0% | 100.0\xa0% |" in body


@pytest.mark.parametrize("name", ["somebody/some-model", "a\n---\nlicense: mit"])
def test_card_invents_no_licence(source, name):
    model = {"source": "hub", "name": name, "revision": "0" * 40}
    card = page.model_card(replace(source, parameters=source.parameters | {"model": model}))
    head = yaml.safe_load(re.split(r"^---$", card, maxsplit=2, flags=re.M)[1])
    assert head["base_model"] == name
    assert "license" not in head
    assert "Q4" not in card


def test_page_is_the_same_bytes_again_and_its_charts_share_no_id(source):
    html = page.html(source)
    assert html == page.html(source)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("content", ["", "<svg><script/></svg>", '<svg onload="x()"></svg>'])
def test_chart_that_could_act_is_refused(content):
    with pytest.raises(UserError, match=r"reports/plan\.svg: not a plain chart"):
        page.inline(content, "plan", "label")


def test_history_has_points_where_it_was_measured(source):
    assert page._points(source.history, "eval_loss").to_dict() == {0: 2.125, 2: 1.0}
    assert "kept: step 2" in page.training_history(source.history, 2)


@pytest.mark.parametrize(("evaluations", "lines"), [(2, 0), (3, 1)])
def test_few_held_out_points_are_not_joined(evaluations, lines):
    history = pd.DataFrame({"step": range(3), "eval_loss": [2.0, 1.0, 0.5]})[:evaluations]
    svg = page.training_history(history, None)
    assert svg.count("stroke-dasharray: 1.5,2.475") == 2 * lines  # in the chart and its legend


def test_summary_has_five_lines(source):
    lines = page.summary(source).splitlines()
    assert len(lines) == 5
    assert "reports/report.html" in lines[0]
    assert "2.0000 → 1.0625 nats a token, base → tuned (−0.9375)" in lines[1]
    assert "12.5\xa0% → 75.0\xa0% (+62.5 points)" in lines[2]
    assert "99.76\xa0% of the most likely tokens, 1.2\xa0×\xa010⁻⁵ nats" in lines[4]


def test_commit_names_changed_files_but_for_those_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources._commit() is None
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for name in ("params.yaml", "dvc.lock", "reports/train.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "."]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "dvc.lock").write_text("b")
    (tmp_path / "reports/train.json").write_text("b")
    assert re.fullmatch("[0-9a-f]{40}", sources._commit() or "")
    (tmp_path / "params.yaml").write_text("b")
    assert str(sources._commit()).endswith(" with uncommitted changes in params.yaml")


def test_keys_have_labels():
    keys = ("train.languages.de", "fields.unknown_one")
    labels = [page.label("prepare", key) for key in keys]
    assert labels == [("Training conversations, de", ""), ("Fields, unknown one", "")]


def test_page_shows_the_use_of_experts(tmp_path):
    before = {"idle": 1, "largest": 2.4, "shares": [[0.6, 0.3, 0.1, 0.0], [0.25] * 4]}
    after = {"idle": 0, "largest": 1.6, "shares": [[0.4, 0.3, 0.2, 0.1], [0.25] * 4]}
    train = made.contents()["reports/train.json"] | {"trainable_by_kind": {"experts": 98_304}}
    use = {"expert_use": {"before": before, "after": after}}
    shown = Elements(page.html(source_of(tmp_path, train=train, details_train=use)))
    assert "before 1 2.40 after 0 1.60" in shown.text
    assert "Trainable parameters, experts 98,304" in shown.text
    assert [tag for tag, _ in shown.tags].count("image") >= 2


def test_page_says_why_nothing_was_exported(tmp_path):
    source = source_of(
        tmp_path, export={"status": "not exported: gpt2 is none of llama"}, details_export={}
    )
    assert "Not exported: gpt2 is none of llama." in Elements(page.html(source)).text
