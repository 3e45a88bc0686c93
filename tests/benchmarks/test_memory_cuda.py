"""Of the benchmark for GPUs, what a CPU can check."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from benchmarks import memory, memory_cuda
from benchmarks.live_memory import LiveMemory
from benchmarks.random_quantized import qlora_model
from benchmarks.training_step import Setting, held_tensors, prepared_step
from stages.plan.named import CONFIGS
from stages.shared.architecture import model_of, model_of_config
from stages.shared.weights import precision
from tests.workspace import ROOT

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config], ids=["untied", "with biases"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_random_model_made_layer_by_layer_takes_the_memory_of_a_loaded_one(
    kind, double_quant, monkeypatch
):
    monkeypatch.setattr(precision, "has_bf16_matmuls", lambda kind: True)  # as on a GPU
    config = kind(**SHAPE, tie_word_embeddings=kind is Qwen2Config)
    setting = Setting("nf4", 8, False, (40, 90, 50), double_quant=double_quant)
    model = qlora_model(config, 8, CPU, double_quant=double_quant)
    assert isinstance(
        model.get_submodule("model.model.layers.0.mlp.up_proj.base_layer"), Linear4bit
    )
    adamw, take = prepared_step(model, setting, CPU, torch.bfloat16)
    live = LiveMemory(held_tensors(model, adamw))
    with live:
        take()
    with torch.device("meta"):
        described = model_of(AutoModelForCausalLM.from_config(config))
    predicted = memory.predict(described, setting).total_bytes
    assert abs(predicted / live.peak_bytes - 1) < 0.03


@pytest.mark.parametrize("most", [0, 1, 2, 5, 8, 100, 127, 128])
def test_the_search_finds_the_largest_value_that_survives(most):
    tried = []

    def survives(value: int) -> bool:
        tried.append(value)
        return value <= 8 * most

    assert memory_cuda.largest(survives, limit=1024, step=8) == 8 * most
    assert len(tried) <= 16


def test_the_search_stops_at_its_limit():
    assert memory_cuda.largest(lambda value: True, limit=1000, step=8) == 1000


def test_mistral_7b_is_planned_to_fit_16_gib_at_512_and_2048_tokens():
    model = model_of_config(CONFIGS / "Mistral-7B.json")
    fits = {
        setting: memory_cuda.would_fit(model, setting, 16 * 2**30)
        for setting in memory_cuda.settings()
    }
    assert all(fits.values())
    long = replace(memory_cuda.settings()[-1], lengths=(8192,), gradient_checkpointing=False)
    assert not memory_cuda.would_fit(model, long, 16 * 2**30)
    assert {setting.tokens for setting in fits} == {512, 2048}


def test_the_table_has_a_line_a_setting():
    setting = memory_cuda.settings()[0]
    text = memory_cuda.table([memory_cuda.Row(setting, 6 * 2**30, 5 * 2**30, 8 * 2**30)])
    assert text.splitlines()[-1] == "| 512 | 8 | yes | 6.00 | 5.00 | +20.0% | 8.00 |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_ends_in_one_line():
    command = [sys.executable, "-m", "benchmarks.memory_cuda"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: this machine has no CUDA device")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_step_of_a_small_model_on_a_gpu_is_predicted_within_8_percent(tmp_path):
    config = LlamaConfig(**SHAPE | {"hidden_size": 1024, "intermediate_size": 4096})
    config.save_pretrained(tmp_path)
    setting = Setting("nf4", 64, True, (2048,), supervised=1.0)
    allocated, _ = memory_cuda.measure(tmp_path / "config.json", setting, torch.device("cuda", 0))
    predicted = memory_cuda.allocated_by_torch(model_of_config(tmp_path / "config.json"), setting)
    assert abs(predicted / allocated - 1) < 0.08
