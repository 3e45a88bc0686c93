"""The benchmarks end to end on models of two layers; the peers where they are installed."""

import importlib.util
import json
import re
from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import common, prepare, train
from tests import tiny

RANDOM = Namespace(random="Tiny", length=32, budget=None, device="cpu", steps=2, rounds=1)


def test_publish_replaces_what_is_between_its_marks(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n")
    table = pd.DataFrame({"who": ["ours"], "tokens/s": ["1,000"]})
    common.publish("x", table, "A machine.", page)
    table_text = "| who | tokens/s |\n| --- | --: |\n| ours | 1,000 |"
    written = f"a\n<!-- x -->\nA machine.\n\n{table_text}\n<!-- end of x -->\nb\n"
    assert page.read_text() == written
    with pytest.raises(ValueError, match="no pair of marks <!-- y -->"):
        common.publish("y", table, "", page)


@pytest.mark.parametrize("script", sorted(Path(common.__file__).parent.glob("*.py")))
def test_every_table_has_its_marks(script: Path) -> None:
    text = script.read_text()
    pages = [getattr(common, name).read_text() for name in ("PAGE", "MEMORY_PAGE", "CLUSTERS_PAGE")]
    for name in re.findall(r'publish\("([^"]+)"', text):
        assert any(f"<!-- {name} -->" in p and f"<!-- end of {name} -->" in p for p in pages), name


def test_summary_has_medians_and_the_ratio_of_each_round():
    def run(who: str, at_once: str, rate: float) -> dict:
        counts = {"tokens_per_second": rate, "share": 0.5, "peak_memory_bytes": 1e9, "loss": 1.0}
        return {"who": who, "at once": at_once, "checkpointed": "no"} | counts

    tried = [run("trl", mode, 50) for mode in ("1", "2", "4", "8", "packed")]
    rounds = [run("ours", "512", 200), run("trl", "4", 100), run("ours", "512", 300)]
    table = train.summarise("sample", pd.DataFrame([*tried, *rounds, run("trl", "4", 100)]), 5)
    by_mode = table.set_index("at once")
    assert by_mode.loc["4", "ours : this"] == "2.50 (2.00–3.00)"
    assert by_mode.loc["512", "tokens/s"] == "250"
    assert list(table["ours : this"]).count("") == len(table) - 1


def test_failed_process_ends_with_its_last_words(tmp_path):
    work = common.Workspace(tmp_path, {})
    with pytest.raises(SystemExit, match=r"No module named stages\.nothing"):
        work.run("stages.nothing")


@pytest.fixture
def work(tmp_path: Path) -> common.Workspace:
    """A workspace with a random model of two layers and eight conversations of 32 tokens."""
    config = tiny.model().config.to_dict() | {"model_type": "llama"}
    (tmp_path / "Tiny.json").write_text(json.dumps(config))
    work = common.Workspace(tmp_path / "work", train.PARAMS | {"train.batch_size": 4})
    train.write_random(work, tmp_path / "Tiny.json", 8, RANDOM)
    return work


def test_random_model_and_tokens_are_trained_on(work):
    metrics = train.train_ours(work, RANDOM, 2)
    assert metrics["tokens_per_second"] > 0
    assert metrics["checkpointed"] == "no"


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="needs trl: make extras")
@pytest.mark.parametrize("conversations", [2, None])
def test_trl_sees_the_same_tokens_and_loss(work, conversations):
    ours = train.train_ours(work, RANDOM, 2)
    job = {"checkpointed": False, "pack_tokens": 128, "device": "cpu", "steps": 2, "cap_gib": None}
    peer, _ = work.run_peer("trl", conversations=conversations, **job)
    assert peer["tokens"] == 8 * 32
    assert peer["loss"] == pytest.approx(ours["loss"], rel=0.01)


def test_prepare_and_datasets_map_agree(tmp_path):
    params = {"data.path": "conversations.jsonl", "prepare.max_rejected": 0.1}
    work = common.Workspace(tmp_path, params)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    tiny.model().save_pretrained(tmp_path / "base")
    for name in ("tokenizer", "base"):
        work.link(f"models/{name}", tmp_path / name)
    used = prepare.measure(work, 60)
    assert set(used.index) == {"prepare", *prepare.PEERS}
    assert (used > 0).all(axis=None)
