"""The plan of a tiny model and of SmolLM2-135M's shape."""

import json
from typing import Any

import pytest

from stages.plan import __main__ as stage
from stages.plan import figures, picture, techniques
from stages.plan.settings import Params
from stages.shared import memory, params
from stages.shared.errors import UserError
from stages.shared.tensors import Tensor

COUNTS = {"train": {"conversations": 1500, "tokens": 96_000, "supervised_tokens": 32_000}}
LAYER = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)} | {
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}
SMOLLM2 = [
    Tensor("model.embed_tokens.weight", "embedding", (49152, 576)),
    *(
        Tensor(f"model.layers.{i}.{name}_proj.weight", "linear", shape, quantizable=True)
        for i in range(30)
        for name, shape in LAYER.items()
    ),
    *(Tensor(f"norm.{i}.weight", "norm", (576,)) for i in range(61)),
    Tensor("lm_head.weight", "head", (49152, 576), tied=True),
]


def settings(**changes: dict[str, Any]) -> Params:
    values: dict[str, dict[str, Any]] = {
        "quantize": {"precision": "nf4", "double_quant": True, "compute_dtype": "bf16"},
        "lora": {
            "r": 16,
            "target_modules": "all-linear",
            "modules_to_save": None,
            "bias": "none",
            "dora": False,
        },
        "train": {
            "method": "lora",
            "epochs": 1,
            "max_steps": None,
            "batch_size": 16,
            "optimizer": "adamw",
        },
        "plan": {},
    }
    for section, change in changes.items():
        values[section] |= change
    return params.validate(Params, values)


def test_smollm2_has_134515008_parameters_and_the_adapter_4884480():
    plan = figures.plan(SMOLLM2, COUNTS, settings())
    assert plan["model"]["parameters"] == 134_515_008
    assert plan["model"]["quantizable"] == 106_168_320
    assert plan["adapter"]["parameters"] == 16 * 30 * (2 * 1152 + 2 * 768 + 3 * 2112) == 4_884_480


def test_qlora_on_smollm2_keeps_54769200_bytes_of_matrices_and_a_dense_embedding():
    way = figures.plan(SMOLLM2, COUNTS, settings())["techniques"]["qlora_nf4_double"]
    dense = 2 * (49152 * 576 + 61 * 576)
    tables = 210 * 4 * (16 + 256 + 1)
    assert way["weights_bytes"] == 53_084_160 + 1_658_880 + 26_160 + tables + dense
    assert way["adapter_bytes"] == way["gradients_bytes"] == 4 * 4_884_480
    assert way["optimizer_bytes"] == 8 * 4_884_480
    assert way["persistent_bytes"] == way["weights_bytes"] + 16 * 4_884_480


def test_full_tuning_takes_16_bytes_a_parameter_and_12_in_pure_bf16():
    ways = figures.plan(SMOLLM2, COUNTS, settings())["techniques"]
    assert ways["full_fp32"]["persistent_bytes"] == 16 * 134_515_008
    assert ways["full_mixed"]["persistent_bytes"] == 16 * 134_515_008
    assert ways["full_bf16"]["persistent_bytes"] == 12 * 134_515_008


def test_configured_is_what_params_yaml_says():
    ways = figures.plan(SMOLLM2, COUNTS, settings())["techniques"]
    assert ways["configured"] == ways["qlora_nf4_double"]
    ways = figures.plan(SMOLLM2, COUNTS, settings(quantize={"precision": "int8"}))["techniques"]
    assert ways["configured"] == ways["lora_int8"]
    full = settings(quantize={"precision": "bf16"}, train={"method": "full"})
    ways = figures.plan(SMOLLM2, COUNTS, full)["techniques"]
    assert ways["configured"] == ways["full_mixed"]
    ways = figures.plan(SMOLLM2, COUNTS, settings(train={"optimizer": "adamw_8bit"}))["techniques"]
    assert ways["configured"]["optimizer_bytes"] < ways["qlora_nf4_double"]["optimizer_bytes"] / 3


def test_seven_billion_parameters_in_fp32_fit_no_card():
    way = techniques.full([Tensor("w", "linear", (70_000, 100_000))], "fp32")
    assert way.persistent_bytes == 112_000_000_000
    assert not any(techniques.fits(way).values())
    half = memory.Persistent(15 * 2**30, 0, 0, 0)
    assert all(techniques.fits(half).values())


def test_a_part_of_a_batch_is_a_step_and_max_steps_is_a_limit():
    assert figures.schedule(COUNTS, settings().train)["steps"] == 94
    assert figures.schedule(COUNTS, settings(train={"epochs": 3}).train)["steps"] == 282
    assert figures.schedule(COUNTS, settings(train={"max_steps": 10}).train)["steps"] == 10
    assert figures.schedule(COUNTS, settings().train)["tokens_per_step"] == 64 * 16


def test_biases_and_modules_to_save_are_trained_too():
    tensors = [
        Tensor("a.q_proj.weight", "linear", (8, 8), quantizable=True),
        Tensor("a.q_proj.bias", "bias", (8,)),
        Tensor("a.k_proj.weight", "linear", (8, 8), quantizable=True),
        Tensor("a.k_proj.bias", "bias", (8,)),
        Tensor("lm_head.weight", "head", (32, 8)),
    ]

    def trainable(**lora: Any) -> int:
        chosen = settings(lora={"r": 1, "target_modules": ["q_proj"]} | lora)
        return figures.adapter(tensors, chosen.lora).trainable

    assert trainable() == 16
    assert trainable(bias="lora_only") == 16 + 8
    assert trainable(bias="all") == 16 + 16
    assert trainable(modules_to_save=["lm_head"]) == 16 + 256


def test_copies_and_biases_keep_the_precision_of_the_dense_parts():
    adapter = techniques.Adapter(matrices=[10], copies=[100], biases=[1])
    way = techniques.lora(SMOLLM2, adapter, "nf4", dense="bf16")
    assert way.adapter_bytes == 4 * 10 + 2 * 100
    assert way.gradients_bytes == 4 * 10 + 2 * 101
    assert techniques.lora(SMOLLM2, adapter, "fp32").gradients_bytes == 4 * 111


def test_targets_that_match_nothing_are_named_with_what_there_is():
    with pytest.raises(UserError, match=r"lora\.target_modules is \['qkv'\].*down_proj, gate_proj"):
        figures.plan(SMOLLM2, COUNTS, settings(lora={"target_modules": ["qkv"]}))


def test_full_tuning_of_quantized_weights_is_refused():
    with pytest.raises(
        UserError, match=r"train\.method is 'full' and quantize\.precision is 'nf4'"
    ):
        figures.plan(SMOLLM2, COUNTS, settings(train={"method": "full"}))


def test_counts_without_training_rows_are_refused():
    for counts in ({}, {"train": {"conversations": 0, "tokens": 0}}):
        with pytest.raises(UserError, match=r"reports/prepare\.json: no train\.conversations"):
            figures.schedule(counts, settings().train)


def test_missing_or_broken_counts_are_told_in_one_line(tmp_path):
    path = tmp_path / "prepare.json"
    for text in (None, "{"):
        if text:
            path.write_text(text)
        with pytest.raises(UserError, match="missing or not JSON"):
            stage.read_counts(path)


def test_the_figures_are_json_and_the_picture_is_the_same_bytes_twice(tmp_path):
    plan = figures.plan(SMOLLM2, COUNTS, settings())
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    for name in ("one.svg", "two.svg"):
        picture.draw(plan["techniques"], tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    assert "qlora_nf4_double" in text
    assert "(the smallest card, T4 with 16 GiB, is out of sight)" in text


def test_cards_stand_as_lines_where_the_model_is_large_enough(tmp_path):
    big = [Tensor("model.layers.0.up_proj.weight", "linear", (70_000, 100_000), quantizable=True)]
    plan = figures.plan(big, COUNTS, settings())
    picture.draw(plan["techniques"], tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    assert all(card in text for card in ("T4 16 GiB", "RTX 3090 / RTX 4090 24", "A100 / H100 80"))


def test_the_terminal_table_has_a_line_a_technique():
    lines = stage.table(figures.plan(SMOLLM2, COUNTS, settings())).splitlines()
    assert lines[0].startswith("persistent memory, MB")
    assert lines[1].split() == ["configured", "111.69", "19.54", "19.54", "39.08", "189.84"]
