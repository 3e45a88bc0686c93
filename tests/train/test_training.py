"""Training on a two-layer model: what is kept, what is refused, and that it repeats itself."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.model import loading, scoring
from stages.shared.model.packing import read_examples
from stages.shared.weights.precision import DTYPES
from tests import tiny
from tests.train.running import run, settings, train_on

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepared(tmp_path_factory.mktemp("data") / "prepared")


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16", "fp16", "fp32"])
def test_an_adapter_learns_on_every_precision(tmp_path: Path, data: Path, precision: str) -> None:
    metrics, curve, keep = run(tmp_path, data, precision)
    assert metrics["eval_loss"] < curve.rows[0]["eval_loss"] - 0.5
    assert metrics["steps"] == 12
    assert sorted(curve.rows) == list(range(13))
    assert (keep / "adapter_model.safetensors").exists()
    assert not (keep / "README.md").exists()


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [("adamw", "linear"), ("adamw", "constant"), ("adamw_8bit", "cosine")],
)
def test_every_optimizer_and_schedule_learns(
    tmp_path: Path, data: Path, optimizer: str, scheduler: str
) -> None:
    metrics, curve, _ = run(
        tmp_path, data, "fp32", train__optimizer=optimizer, train__scheduler=scheduler
    )
    assert metrics["eval_loss"] < curve.rows[0]["eval_loss"] - 0.5


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_full_fine_tuning_keeps_a_standalone_model(
    tmp_path: Path, data: Path, precision: str
) -> None:
    metrics, curve, keep = run(tmp_path, data, precision, train__method="full")
    assert metrics["eval_loss"] < curve.rows[0]["eval_loss"] - 0.5
    assert loading.stored_dtype(keep) == DTYPES[precision]
    assert {t.dtype for t in load_file(keep / "model.safetensors").values()} == {DTYPES[precision]}


def test_a_weighted_loss_is_not_compared_with_the_held_out_one(tmp_path: Path) -> None:
    data = tiny.prepared(tmp_path / "prepared", 4, 4)
    table = pq.read_table(data / "train.parquet")
    weights = [[0.5 * one for one in mask] for mask in table["loss_mask"].to_pylist()]
    column = pa.array(weights, pa.list_(pa.float32()))
    pq.write_table(table.append_column("weights", column), data / "train.parquet")
    metrics, _, _ = run(tmp_path, data, "fp32", train__epochs=1)
    assert metrics["loss"] is not None
    assert metrics["generalization_gap"] is None


@pytest.mark.parametrize(("method", "precision"), [("lora", "nf4"), ("full", "bf16")])
def test_what_was_kept_scores_exactly_what_was_reported(
    tmp_path: Path, data: Path, method: str, precision: str
) -> None:
    metrics, _, keep = run(tmp_path, data, precision, train__method=method)
    model = loading.load_adapted(keep, tmp_path / "quantized", CPU)
    dtype = loading.compute_dtype(tmp_path / "quantized", CPU)
    sums, tokens = scoring.score(model, read_examples(data / "eval.parquet"), CPU, dtype, "test")
    assert scoring.mean_loss(sums, tokens) == pytest.approx(metrics["eval_loss"], abs=1e-6)


def test_the_best_evaluation_is_kept_and_patience_stops(tmp_path: Path, data: Path) -> None:
    metrics, curve, keep = run(
        tmp_path,
        data,
        "fp32",
        train__epochs=30,
        train__learning_rate=10.0,
        train__scheduler="constant",  # falling, it would calm down again
        train__patience=2,
    )
    losses = {s: r["eval_loss"] for s, r in curve.rows.items() if "eval_loss" in r}
    assert metrics["stopped_early"]
    assert metrics["eval_loss"] == min(losses.values()) == losses[metrics["best_step"]]
    assert metrics["best_step"] < metrics["steps"]
    model = loading.load_adapted(keep, tmp_path / "quantized", CPU)
    sums, tokens = scoring.score(
        model, read_examples(data / "eval.parquet"), CPU, torch.float32, "test"
    )
    assert scoring.mean_loss(sums, tokens) == pytest.approx(metrics["eval_loss"], abs=1e-6)


def test_the_same_parameters_give_the_same_bytes(tmp_path: Path, data: Path) -> None:
    kept = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        *_, keep = run(tmp_path / name, data, "nf4", lora__dropout=0.1, train__max_steps=3)
        # The adapter's config names the folder it was trained on, which differs here alone.
        kept.append(files.sha256(keep / "adapter_model.safetensors"))
    assert kept[0] == kept[1]


def test_a_step_has_one_gradient_however_it_is_divided(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.shared.core import machine

    norms = []
    for tokens in ("1", "30", "64", "4096"):
        monkeypatch.setenv("QLORA_MICRO_BATCH_TOKENS", tokens)
        machine.machine.cache_clear()
        folder = tmp_path / tokens
        folder.mkdir()
        metrics, curve, _ = run(folder, data, "fp32", train__max_steps=4)
        assert metrics["micro_batch_tokens"] == int(tokens)
        norms.append([curve.rows[s]["gradient_norm"] for s in range(1, 5)])
    machine.machine.cache_clear()
    for other in norms[1:]:
        assert norms[0] == pytest.approx(other, rel=1e-4)


def test_evaluating_in_between_leaves_quantized_weights_alone(tmp_path: Path, data: Path) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes would repack them in place (see models.py)."""
    losses = []
    for name, eval_steps in (("often", 1), ("never", 100)):
        (tmp_path / name).mkdir()
        _, curve, _ = run(
            tmp_path / name,
            data,
            "nf4",
            train__eval_steps=eval_steps,
            train__patience=100,
            train__epochs=1,
        )
        losses.append([curve.rows[s]["loss"] for s in range(1, 7)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("precision", "changes", "expected"),
    [
        ("nf4", {"train__method": "full"}, "train.method: full cannot train quantized weights"),
        ("fp16", {"train__method": "full"}, "train.method: full cannot train fp16 weights"),
        (
            "fp32",
            {"lora__target_modules": ["no_such"]},
            "lora.target_modules: ['no_such'] does not fit",
        ),
        ("fp32", {"lora__target_modules": "no.*such"}, "q_proj"),
        (
            "fp32",
            {"lora__modules_to_save": ["no_such"]},
            "lora.modules_to_save: this model has no module 'no_such'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    tmp_path: Path, data: Path, precision: str, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as error:
        run(tmp_path, data, precision, **changes)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path: Path, data: Path) -> None:
    params = settings(train__epochs=5)
    train = params.train.model_copy(update={"learning_rate": 1e30})  # beyond what is allowed
    model = tiny.quantize(tmp_path / "quantized", "fp32")
    with pytest.raises(UserError, match="training stopped at step"):
        train_on(params.model_copy(update={"train": train}), data, model, tmp_path / "adapter")
