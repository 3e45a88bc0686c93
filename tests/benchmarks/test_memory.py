"""The planner against real steps, and the instrument that measures them."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from benchmarks import memory, memory_table
from benchmarks.live_memory import LiveMemory
from benchmarks.training_step import (
    Setting,
    held_tensors,
    in_precision,
    load,
    micro_batch,
    prepared_step,
    random_base,
)
from stages.shared import peak
from stages.shared.architecture import model_of_config
from stages.shared.model import loading, packing, scoring
from stages.shared.step import masters
from stages.shared.step.adapter_sizes import adapter_of
from stages.shared.workspace import micro_batch_of

CPU = torch.device("cpu")

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
LENGTHS = (40, 90, 50)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    work = tmp_path_factory.mktemp("models")
    heads = {"head_dim": 16}
    return {
        "llama": random_base(LlamaConfig(**SHAPE, tie_word_embeddings=True), work / "llama"),
        "qwen3": random_base(Qwen3Config(**SHAPE, **heads), work / "qwen3"),
        "gpt2": random_base(
            GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=500), work / "gpt2"
        ),
    }


@pytest.mark.parametrize(
    "setting",
    [
        Setting("nf4", 8, False, LENGTHS),
        Setting("nf4", 64, True, LENGTHS, double_quant=False),
        Setting("int8", 8, True, LENGTHS),
        Setting("bf16", 8, False, LENGTHS, optimizer="adamw_8bit"),
        Setting("bf16", None, True, LENGTHS),
        Setting("fp32", None, False, LENGTHS),
        Setting("bf16", None, False, LENGTHS, optimizer="adamw_8bit"),
        Setting("nf4", 8, True, LENGTHS, dropout=0.1),
        Setting("nf4", 8, False, LENGTHS, fusing=False),
        Setting("nf4", 8, True, LENGTHS),
        Setting("fp32", 8, False, LENGTHS),
    ],
    ids=memory_table.trained,
)
def test_the_predicted_peak_is_within_3_percent_of_a_real_step(bases, setting):
    row = memory.measured_row("llama", bases["llama"], setting)
    assert row.predicted.calibrated
    assert abs(row.error) < 0.03, (row.predicted, row.measured.peak_bytes)


def test_heads_with_norms_of_their_own_are_predicted_too(bases):
    row = memory.measured_row("qwen3", bases["qwen3"], Setting("nf4", 8, False, LENGTHS))
    assert row.predicted.calibrated
    assert abs(row.error) < 0.03


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_of_another_kind_lies_within_the_range_it_is_given(bases, checkpointed):
    row = memory.measured_row("gpt2", bases["gpt2"], Setting("nf4", 8, checkpointed, LENGTHS))
    assert not row.predicted.calibrated
    assert row.predicted.lowest_bytes < row.measured.peak_bytes < row.predicted.total_bytes


def test_the_benchmark_measures_at_least_60_settings_of_four_models():
    wanted = list(memory.settings())
    assert len(wanted) == len(set(wanted)) >= 60
    assert {model for model, _ in wanted} == {*memory.SMALL, "default"}
    settings = [setting for _, setting in wanted]
    assert {s.precision for s in settings} == {"nf4", "fp4", "int8", "bf16", "fp32"}
    assert {s.rank for s in settings} >= {8, 64, None}
    assert {s.gradient_checkpointing for s in settings} == {True, False}
    assert len({s.tokens for s in settings}) >= 3


def test_a_storage_counts_once_until_its_last_view_is_gone():
    with LiveMemory() as memory_:
        whole = torch.ones(1000)
        part = whole.view(10, 100)
        assert memory_.live_bytes == 4000
        del whole
        assert memory_.live_bytes == 4000
        double = part * 2
        assert memory_.live_bytes == 8000
        del part, double
        assert memory_.live_bytes == 0
    assert memory_.peak_bytes == 8000


def test_what_autograd_saved_counts_until_backward_is_over():
    x = torch.ones(1000, requires_grad=True)
    with LiveMemory([x]) as memory_:
        loss = x.exp().sum()  # saves its result
        assert memory_.live_bytes == 4000 + 4000 + 4
        loss.backward()
        del loss
        assert memory_.live_bytes == 4000 + 4000  # and the gradient


def test_a_4_bit_product_is_looked_into_and_its_dequantized_matrix_counts():
    layer = Linear4bit(512, 256, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer = layer.to("cpu")
    with LiveMemory(keep_storages=True) as memory_:
        layer(torch.ones(1, 8, 512, dtype=torch.bfloat16))
    assert 2 * 512 * 256 in [size for size, _ in memory_.peak_storages]


def test_the_table_and_the_picture_name_each_setting(bases, tmp_path):
    rows = [memory.measured_row("llama", bases["llama"], Setting("nf4", 8, False, LENGTHS))]
    text = memory_table.table(rows)
    assert "| llama | rank 8 on nf4 | no | 180 |" in text
    assert text.endswith(memory_table.summary(rows))
    memory_table.draw(rows, tmp_path / "memory.svg")
    assert "llama" in (tmp_path / "memory.svg").read_text()


@pytest.mark.parametrize(
    "setting",
    [Setting("nf4", 8, False, LENGTHS), Setting("bf16", None, False, LENGTHS)],
    ids=memory_table.trained,
)
def test_scoring_between_steps_takes_no_more_than_predicted(bases, setting):
    base = bases["llama"]
    folder = in_precision(base, base.with_name(f"scored-{setting.precision}"), setting, CPU)
    model = load(folder, setting, CPU)
    dtype = loading.compute_dtype(folder, CPU)
    adamw, _ = prepared_step(model, setting, CPU, dtype)
    live = LiveMemory(list(held_tensors(model, adamw)))
    with live, masters.as_saved(model, torch.bfloat16, dtype):
        scoring.score(model, micro_batch(setting, 500), CPU, dtype, "score")
    described = model_of_config(base / "config.json")
    adapter = adapter_of(described.tensors, rank=8) if setting.rank else None
    tuning = memory.tuning_of(setting, adapter, "cpu")
    [together] = packing.bins(micro_batch(setting, 2), setting.tokens)
    batch = micro_batch_of(together)
    predicted = peak.evaluation(described, tuning, batch).total_bytes
    assert live.peak_bytes <= 1.01 * predicted < 1.2 * live.peak_bytes
