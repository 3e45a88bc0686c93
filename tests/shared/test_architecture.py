"""The counts from a config alone, held against real models."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, MixtralConfig

from stages.plan.named import CONFIGS
from stages.shared.architecture import (
    Stored,
    model_of,
    model_of_config,
    stored_as,
    tensors_of,
)
from stages.shared.blocks import Block
from stages.shared.core.errors import UserError
from stages.shared.memory import lora_sizes
from stages.shared.tensors import lora_targets, parameter_count
from tests import tiny
from tests.architectures import BESIDES, OTHERS, SHAPE


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_the_config_alone_gives_the_parameters_of_the_model(tmp_path):
    model = tiny.model()
    model.config.save_pretrained(tmp_path)
    tensors = model_of_config(tmp_path / "config.json").tensors
    assert parameter_count(tensors) == sum(p.numel() for p in model.parameters())
    assert parameter_count(tensors, "embedding") == 384 * 64
    assert parameter_count(tensors, "head") == 0  # tied
    assert parameter_count(tensors, "norm") == 5 * 64


@pytest.mark.parametrize(
    ("target_modules", "dora"),
    [
        ("all-linear", False),
        ("all-linear", True),
        (["q_proj", "down_proj"], False),
        (r".*layers\.1\..*(k|v)_proj", True),
        (["embed_tokens"], False),
    ],
)
def test_the_adapter_has_as_many_parameters_as_peft_trains(target_modules, dora):
    tensors = tensors_of(tiny.model())
    targets = lora_targets(tensors, target_modules)
    predicted = sum(size for t in targets for size in lora_sizes(t, 4, dora=dora))
    adapted = get_peft_model(
        tiny.model(),
        LoraConfig(r=4, target_modules=target_modules, use_dora=dora, task_type="CAUSAL_LM"),
    )
    assert predicted == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(
    "target_modules",
    [
        "all-linear",
        ["o_proj"],
        ["gate_proj", "up_proj", "w1", "w3", "o_proj"],
        r".*layers\.1\..*(up_proj|gate_proj|w1|w3|o_proj)",
    ],
)
def test_the_adapter_of_a_mixture_has_as_many_parameters_as_peft_trains(kind, target_modules):
    """Its experts lie in one tensor, and peft adapts each of them by the names that they had."""
    model = on_meta(CONFIG_MAPPING[kind](**SHAPE | (BESIDES | OTHERS)[kind]))
    targets = lora_targets(tensors_of(model), target_modules)
    predicted = sum(size for t in targets for size in lora_sizes(t, 4))
    with torch.device("meta"):
        adapted = get_peft_model(
            model, LoraConfig(r=4, target_modules=target_modules, task_type="CAUSAL_LM")
        )
    assert predicted == adapted.get_nb_trainable_parameters()[0]


def test_fused_experts_and_their_router_stay_dense():
    model = on_meta(
        MixtralConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=384,
            num_local_experts=4,
        )
    )
    tensors = tensors_of(model)
    assert parameter_count(tensors, "experts") == 2 * 4 * 3 * 64 * 128
    assert parameter_count(tensors, "other") == 2 * 4 * 64
    quantizable = sum(t.size for t in tensors if t.quantizable)
    assert quantizable == 2 * (2 * 64 * 64 + 2 * 32 * 64)


def test_a_layer_that_stores_its_matrix_transposed_has_its_rows_by_output():
    tensors = tensors_of(on_meta(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)))
    shapes = {t.name: t.shape for t in tensors if t.kind == "linear"}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (96, 32)


@pytest.mark.parametrize("config", [{"model_type": "no-such-model"}, {"model_type": "clip"}, {}])
def test_a_config_that_is_no_language_model_is_told_in_one_line(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: .*; expected .*; choose") as error:
        model_of_config(path)
    assert "\n" not in str(error.value)


def test_a_missing_config_names_the_stage_that_writes_it(tmp_path):
    with pytest.raises(UserError, match="run `dvc repro fetch_model`"):
        model_of_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen1.5-0.5B", 463_987_712),
        ("Llama-2-7B", 6_738_415_616),
        ("Mistral-7B", 7_241_732_096),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3-70B", 70_553_706_496),
        ("Mixtral-8x7B", 46_702_792_704),
    ],
)
def test_shipped_configs_have_exactly_the_published_number_of_parameters(name, parameters):
    model = model_of_config(CONFIGS / f"{name}.json")
    assert parameter_count(model.tensors) == parameters
    assert (model.block is None) == (name == "Mixtral-8x7B")


def test_widths_of_a_block_are_read_from_its_matrices():
    model = model_of_config(CONFIGS / "Llama-3-8B.json")
    assert model.block == Block(4096, 4096, 1024, 14336, heads=32)
    assert (model.layers, model.hidden, model.vocabulary) == (32, 4096, 128_256)
    assert model_of_config(CONFIGS / "Mistral-7B.json").window == 4096
    assert model_of_config(CONFIGS / "Mixtral-8x7B.json").active_experts == 2


def test_an_activation_other_than_silu_is_not_taken_for_a_known_block():
    config = tiny.model().config
    config.hidden_act = "gelu"
    assert model_of(on_meta(config)).block is None


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("nf4", Stored("nf4", True, "bf16")),
        ("fp4", Stored("fp4", True, "bf16")),
        ("int8", Stored("int8", False, "bf16")),
        ("bf16", Stored("bf16", False, "bf16")),
        ("fp32", Stored("fp32", False, "fp32")),
    ],
)
def test_the_precision_of_stored_weights_is_read_from_their_config(tmp_path, precision, expected):
    folder = tiny.quantize(tmp_path / "quantized", precision)
    assert stored_as(folder / "config.json") == expected
    assert model_of_config(folder / "config.json") == model_of(tiny.model())
