"""Whole pipeline on a two-layer model, run by DVC as by a user; the stages a change reruns."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo

from stages.shared.core import files
from tests import tiny, workspace
from tests.test_contract import declared, declared_code, python_files
from tests.workspace import Workspace

EVALUATIONS = {f"evaluate@{variant}" for variant in ("base", "quantized", "adapter", "merged")}
AFTER_TRAINING = {"train", "merge", "export", "evaluate@adapter", "evaluate@merged"}
SMALL = {
    "data.path": "mine.jsonl",
    "model.source": "path",
    "model.name": "my-model",
    "lora.r": 8,
    "train.max_steps": 2,
    "train.batch_size": 4,
    "train.learning_rate": 5e-3,
    "export.formats": [],
    "evaluate.generate_rows": 2,
    "evaluate.max_new_tokens": 3,
    "evaluate.prompts": 1,
}


def write_conversations(path: Path, count: int, first: int = 0) -> None:
    rows = [
        {"text": f"### Human: What is {i} plus 1?### Assistant: It is {i + 1}.\n{i + 1}"}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ran(space: Workspace) -> set[str]:
    """Run `dvc repro`; returns the stages that it ran, and not those it restored."""
    done = space.dvc("repro")
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"Running stage '([^']+)'", done.stdout))


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("pipeline")
    made = workspace.make(root, SMALL)
    model = tiny.save(root / "my-model")
    made.set_params({"model.revision": files.folder_sha256(model)})
    write_conversations(root / "mine.jsonl", 40)
    assert ran(made) == set(declared())
    return made


@pytest.fixture
def change(space: Workspace) -> Iterator[Workspace]:
    """The workspace with its first parameters and data; outs are those of the test before.

    Whatever has run before is restored from the run cache, and not run again.
    """
    params = (space.root / "params.yaml").read_text()
    yield space
    (space.root / "params.yaml").write_text(params)
    write_conversations(space.root / "mine.jsonl", 40)


def metrics(space: Workspace, name: str) -> dict[str, Any]:
    return files.read_json(space.root / "reports" / name)


def test_metrics_are_those_of_the_design_and_no_more(space: Workspace) -> None:
    expected = {
        "prepare.json": "rows_in rejected duplicates leaked truncated train eval",
        "quantize.json": "parameters bytes bits_per_parameter relative_error",
        "train.json": "trainable_parameters steps loss eval_loss best_step stopped_early "
        "peak_memory_bytes predicted_memory_bytes tokens_per_second supervised_tokens_per_second "
        "device optimizer micro_batch_tokens gradient_checkpointing resumed_from_step "
        "generalization_gap",
        "merge.json": "onto kl_divergence top1_agreement runtime_kl_divergence "
        "runtime_top1_agreement bytes",
        "export.json": "status",
    }
    scores = "loss perplexity bits_per_byte tokens stop_rate exact_match by_language"
    expected |= {f"evaluate/{v.partition('@')[2]}.json": scores for v in EVALUATIONS}
    for name, keys in expected.items():
        more = {"mix", "trainable_by_kind"}  # of several sources; of a mixture of experts
        assert set(metrics(space, name)) - more == set(keys.split()), name
        both = {"train", "eval", "by_language"}
        assert not set(metrics(space, f"details/{name}")) & {*keys.split()} - both
    counts = {"conversations", "tokens", "supervised_tokens", "longest_tokens"}
    for split in ("train", "eval"):
        assert set(metrics(space, "prepare.json")[split]) - {"rows", "by_source"} == counts
    assert {"versions", "device"} <= metrics(space, "details/train.json")["environment"].keys()
    shown = json.loads(space.dvc("metrics", "show", "--json").stdout)[""]["data"]
    assert not [name for name in shown if "details" in name or "plan" in name]
    assert "<svg" in (space.root / "reports/report.html").read_text()
    assert (space.root / "reports/model_card.md").exists()


def test_training_and_evaluation_report_one_number(space: Workspace) -> None:
    trained, evaluated = metrics(space, "train.json"), metrics(space, "evaluate/adapter.json")
    assert evaluated["loss"] == pytest.approx(trained["eval_loss"], abs=1e-6)
    assert evaluated["loss"] < metrics(space, "evaluate/quantized.json")["loss"]


def test_nothing_changed_runs_nothing_and_says_so(space: Workspace) -> None:
    done = space.dvc("repro")
    assert "up to date" in done.stdout
    assert "Running" not in done.stdout


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"quantize.precision": "int8"},
         {"quantize", "evaluate@quantized", "plan"} | AFTER_TRAINING),
        ({"merge.onto": "original", "export.formats": ["gguf-q8_0"]},
         {"merge", "export", "evaluate@merged"}),
        ({"evaluate.max_new_tokens": 4}, EVALUATIONS),
        ({"data.revision": "a" * 40}, {"fetch_data"}),  # of no effect on a file
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_parameter_reruns_what_depends_on_it(
    change: Workspace, params: dict[str, Any], expected: set[str]
) -> None:
    change.set_params(params)
    assert ran(change) == expected | {"report"}


def test_other_conversations_leave_the_base_model_alone(change: Workspace) -> None:
    write_conversations(change.root / "other.jsonl", 40, first=100)
    change.set_params({"data.path": "other.jsonl", "prepare.template": "guanaco"})
    assert ran(change) == set(declared()) - {"fetch_model", "quantize"}


def test_more_conversations_to_train_on_evaluate_no_base_again(change: Workspace) -> None:
    # All added ones fall into the training split, by their hashes.
    write_conversations(change.root / "mine.jsonl", 48)
    assert ran(change) == {"fetch_data", "prepare", "plan", "report"} | AFTER_TRAINING


def test_another_model_leaves_the_raw_data_alone(change: Workspace) -> None:
    other = tiny.save(change.root / "other-model", seed=1)
    change.set_params({"model.name": "other-model", "model.revision": files.folder_sha256(other)})
    # The other model has the same tokenizer, so the prepared data stays.
    assert ran(change) == set(declared()) - {"fetch_data", "prepare", "plan"}


def test_rank_8_to_16_and_back_trains_nothing_the_third_time(space: Workspace) -> None:
    assert not ran(space) & AFTER_TRAINING
    before = files.sha256(space.root / "models/adapter/adapter_model.safetensors")
    space.set_params({"lora.r": 16})
    assert ran(space) == AFTER_TRAINING | {"plan", "report"}
    space.set_params({"lora.r": 8})
    assert not ran(space) & (AFTER_TRAINING | {"quantize", "prepare"})
    assert files.sha256(space.root / "models/adapter/adapter_model.safetensors") == before


def test_an_edit_marks_the_stages_that_declare_its_folder(space: Workspace) -> None:
    users = {stage: declared_code(stage) for stage in declared()}
    originals = {
        source: source.read_text()
        for name in sorted(set().union(*users.values()))
        for source in [min(python_files(space.root / name))]
    }
    for source, text in originals.items():
        source.write_text(text + "# changed\n")
    with Repo(str(space.root)) as repo:
        status = repo.status()
    for source, text in originals.items():
        source.write_text(text)
    changed = {
        address.rpartition(":")[2]: sorted(
            path for entry in entries if "changed deps" in entry for path in entry["changed deps"]
        )
        for address, entries in status.items()
    }
    assert changed == {stage: sorted(used) for stage, used in users.items()}


def test_a_change_without_an_effect_stops_at_its_own_stage(space: Workspace) -> None:
    source = min(python_files(space.root / "stages/merge"))
    text = source.read_text()
    source.write_text(text + "# changed\n")
    assert ran(space) == {"merge"}
    source.write_text(text)
    assert ran(space) == set()


def test_a_stage_that_fails_leaves_the_outs_of_earlier_ones(change: Workspace) -> None:
    before = files.folder_sha256(change.root / "models/quantized")
    change.set_params({"lora.target_modules": ["no_such_layer"]})
    done = change.dvc("repro")
    assert done.returncode != 0
    assert "error: lora.target_modules: ['no_such_layer']" in done.stderr
    assert files.folder_sha256(change.root / "models/quantized") == before
    assert not list((change.root / "models").glob("*.partial"))


def test_an_experiment_in_a_temporary_workspace(space: Workspace) -> None:
    shutil.copy(space.root / "mine.jsonl", space.root / "copied.jsonl")
    for command in (("add", "--all"), ("commit", "--quiet", "--message", "all")):
        space.run("git", "-c", "user.name=a", "-c", "user.email=a@b.c", *command)
    done = space.dvc("exp", "run", "--temp", "--set-param", "evaluate.max_new_tokens=5")
    assert done.returncode == 0, done.stdout + done.stderr
    shown = space.dvc("exp", "show", "--json")
    assert '"max_new_tokens": 5' in shown.stdout
