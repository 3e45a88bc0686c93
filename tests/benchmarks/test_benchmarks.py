"""The benchmarks end to end on models of two layers; the peers where they are installed."""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import budget, common, gpu, prepare, train
from tests import tiny
from tests.test_contract import declared

OWN_PARAMS = {
    "train.batch_size": 4,
    "train.epochs": 1,
    "train.learning_rate": 1e-12,
    "train.scheduler": "constant",
    "train.warmup": 0.0,
}


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


def test_every_table_has_its_marks():
    page = common.PAGE.read_text()
    for name in ("budget", "train", "prepare", "mixtures", "gpu"):
        assert f"<!-- {name} -->" in page
        assert f"<!-- end of {name} -->" in page


def test_summary_has_medians_and_the_ratio_of_each_round():
    def row(who: str, mode: str, rate: float) -> dict:
        figures = {"tokens_per_second": rate, "of": 0.5, "peak_memory_bytes": 1e9}
        return {"who": who, "mode": mode, **figures}

    tried = [row("trl", mode, 50) for mode in ("1", "2", "4", "8", "packed")]
    rounds = [row("ours", "512", 200), row("trl", "4", 100), row("ours", "512", 300)]
    table = train.summarise("sample", pd.DataFrame([*tried, *rounds, row("trl", "4", 100)]))
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
    """A workspace with a tiny model and eight conversations of equal length."""
    work = common.Workspace(tmp_path / "work", OWN_PARAMS)
    tiny.quantize(tmp_path / "quantized", "nf4")
    for name in ("quantized", "base"):
        work.link(f"models/{name}", tmp_path / "quantized")
    work.link("models/tokenizer", tmp_path / "base")
    gpu.write_conversations(work.root / "data/prepared", 8, 32, vocabulary=384)
    return work


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="needs trl: make extras")
@pytest.mark.parametrize("micro_batch", [2, None])
def test_trl_sees_the_same_tokens_and_loss(work, micro_batch):
    work.run("stages.train", env={"QLORA_DEVICE": "cpu"})
    history = pd.read_csv(work.root / "reports/train/loss.csv")
    job = {"micro_batch": micro_batch, "checkpointing": False, "pack_tokens": 128}
    figures = work.train_peer("trl", device="cpu", steps=2, **job)
    assert figures["tokens"] == 8 * 32
    assert figures["loss"] == pytest.approx(history["loss"].mean(), rel=0.01)


def test_prepare_and_datasets_map_agree(tmp_path):
    params = {"data.path": "conversations.jsonl", "prepare.max_rejected": 0.1}
    work = common.Workspace(tmp_path, params)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    tiny.model().save_pretrained(tmp_path / "base")
    for name in ("tokenizer", "base"):
        work.link(f"models/{name}", tmp_path / name)
    used = prepare.measure(work, 60, tmp_path / "tokenizer")
    assert set(used) == {"prepare", *prepare.PEERS}
    assert all(usage.peak_bytes > 0 for usage in used.values())


def test_random_model_is_quantized_as_training_reads_it(tmp_path, monkeypatch):
    config = tiny.model().config.to_dict() | {"model_type": "llama"}
    (tmp_path / "Tiny.json").write_text(json.dumps(config))
    monkeypatch.setattr(gpu, "CONFIGS", tmp_path)
    work = common.Workspace(tmp_path / "work", OWN_PARAMS)
    gpu.write_model("Tiny", work.root / "models", "cpu")
    gpu.write_conversations(work.root / "data/prepared", 32, 32, vocabulary=384)
    options = Namespace(model="Tiny", length=32, budget=None, device="cpu")
    table = gpu.training(work, options, [])
    assert table["who"].tolist() == ["ours"]
    assert float(table["tokens/s"].iloc[0].replace(",", "")) > 0


def test_budget_has_every_stage_once():
    budgeted = [stage for _, stages in budget.BUDGET.values() for stage in stages]
    assert sorted(budgeted) == sorted(declared())
