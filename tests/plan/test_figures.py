"""The plan's figures, of SmolLM2-135M's shape and of well-known models."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.plan import config, figures, output
from stages.plan.config import CONFIGS
from stages.shared.core.errors import UserError
from stages.shared.step.memory.predict import StepCounter
from stages.shared.step.memory.setup import lora_of
from tests.plan.cases import DATA, settings, written

ADAPTER = 4_884_480


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StepCounter]:
    with StepCounter(written(tmp_path_factory.mktemp("config"))) as counter:
        yield counter


def test_smollm2_has_its_parameters(smollm2: StepCounter) -> None:
    plan = figures.plan(smollm2, DATA, settings())
    assert plan["model"]["parameters"] == 134_515_008
    assert plan["model"]["quantizable"] == 106_168_320
    assert plan["model"]["attention"] == 30 * (2 * 576 * 576 + 2 * 192 * 576)
    assert plan["model"]["mlp"] == 30 * 3 * 576 * 1536
    assert plan["model"]["tied_head"] is True
    assert plan["adapter"]["parameters"] == 16 * 30 * (2 * 1152 + 2 * 768 + 3 * 2112) == ADAPTER
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    assert plan["micro_batch"]["tokens"] <= figures.MICRO_BATCH_TOKENS


def test_qlora_on_smollm2_has_its_bytes(
    smollm2: StepCounter,
) -> None:
    ways = figures.plan(smollm2, DATA, settings())["techniques"]
    way = ways["qlora_nf4_double"]
    dense = 2 * (49152 * 576 + 61 * 576)
    tables_bytes = 210 * 4 * (16 + 256 + 1)
    assert way["weights_bytes"] == 53_084_160 + 1_658_880 + 26_160 + tables_bytes + dense
    assert way["adapter_bytes"] == way["gradients_bytes"] == 4 * ADAPTER
    assert way["optimizer_bytes"] == 8 * ADAPTER
    assert way["persistent_bytes"] == way["weights_bytes"] + 16 * ADAPTER < way["peak_bytes"]
    assert ways["full_mixed"]["persistent_bytes"] == 16 * 134_515_008
    assert ways["full_bf16"]["persistent_bytes"] == 12 * 134_515_008
    assert [name for name, one in ways.items() if one["upper_bound"]] == ["lora_int8"]


@pytest.mark.parametrize(
    ("changes", "like"),
    [
        ({}, "qlora_nf4_double"),
        ({"quantize": {"precision": "int8"}}, "lora_int8"),
        ({"quantize": {"precision": "bf16"}, "train": {"method": "full"}}, "full_mixed"),
    ],
)
def test_configured_is_what_params_yaml_says(smollm2: StepCounter, changes, like) -> None:
    ways = figures.plan(smollm2, DATA, settings(**changes))["techniques"]
    assert ways["configured"] == ways[like]


def test_paged_optimizer_leaves_small_tensors_on_the_device(smollm2: StepCounter) -> None:
    ways = figures.techniques(lora_of(settings().lora) | {"r": 256})
    name = "qlora_nf4_double_checkpointed_paged"
    batch = figures.MicroBatch((160,), 50)
    paged = figures.technique(smollm2, name, ways[name], batch)
    assert paged["optimizer_bytes"] + paged["pageable_bytes"] == 8 * 16 * ADAPTER
    assert 0 < paged["optimizer_bytes"] < paged["pageable_bytes"]


def test_cards_get_the_fastest_settings_that_fit() -> None:
    with StepCounter(CONFIGS / "Llama-3-8B.json") as counter:
        plan = figures.plan(counter, replace(DATA, longest=4096), settings())
    cards = plan["configured_on"]
    assert cards["T4_16GiB"]["gradient_checkpointing"] is True
    assert cards["A100_40GiB"]["gradient_checkpointing"] is False
    assert cards["T4_16GiB"]["peak_bytes"] < 16 * 2**30
    assert not plan["techniques"]["full_mixed"]["fits"]["H100_80GiB"]
    assert output.smallest_card(plan["techniques"]["full_bf16"]["fits"]) == "141 GiB"
    lines = output.cards(plan).splitlines()
    assert lines[0] == "what fits"
    assert "set quantize.compute_dtype=fp16" in next(line for line in lines if "T4" in line)
    assert "bytes alone" in next(line for line in lines if "MI300X" in line)


@pytest.mark.parametrize(
    ("quantize", "method", "instead"),
    [
        ({}, "lora", "quantize.compute_dtype=fp16"),
        ({"compute_dtype": "fp16"}, "lora", None),
        ({"precision": "fp32"}, "lora", None),
        ({"precision": "bf16"}, "lora", "quantize.precision=fp16"),
        ({"precision": "bf16"}, "full", "quantize.precision=fp32"),
    ],
)
def test_card_without_bf16_says_what_it_needs(quantize, method, instead) -> None:
    setup = figures.configured(settings(quantize=quantize, train={"method": method}))
    found = {card: figures.instead_of_bf16(card, setup) for card in figures.CARDS_GIB}
    assert found == {card: instead if card == "T4_16GiB" else None for card in found}


def test_technique_that_cannot_be_is_left_out_with_its_reason(smollm2: StepCounter) -> None:
    saved = settings(
        quantize={"precision": "bf16"},
        lora={"modules_to_save": ["down_proj"], "target_modules": ["q_proj"]},
    )
    plan = figures.plan(smollm2, DATA, saved)
    assert "qlora_nf4" not in plan["techniques"]
    assert "down_proj" in plan["left_out"]["qlora_nf4"]
    assert "left out: qlora_nf4: " in output.techniques(plan)


def test_targets_that_match_nothing_are_named_with_what_there_is(smollm2: StepCounter) -> None:
    with pytest.raises(UserError, match=r"lora\.target_modules: \['qkv'\].*down_proj, gate_proj"):
        figures.plan(smollm2, DATA, settings(lora={"target_modules": ["qkv"]}))


def test_full_tuning_of_quantized_weights_is_refused() -> None:
    with pytest.raises(UserError, match=r"method is 'full' and quantize\.precision is 'nf4'"):
        figures.configured(settings(train={"method": "full"}))


def test_steps_end_with_max_steps_or_the_last_part_of_a_batch() -> None:
    assert figures.schedule(DATA, settings())["steps"] == 94
    assert figures.schedule(DATA, settings(train={"epochs": 3}))["steps"] == 282
    assert figures.schedule(DATA, settings(train={"max_steps": 10}))["steps"] == 10
    assert figures.schedule(DATA, settings())["tokens_per_step"] == 64 * 16


@pytest.mark.parametrize("text", [None, "{", "{}", '{"train": {"conversations": 0, "tokens": 0}}'])
def test_counts_that_are_missing_or_broken_are_one_line(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "prepare.json"
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=r"prepare\.json: no counts .* Run `dvc repro prepare`"):
        config.data_of(None, 1, path)


def test_token_costs_2_operations_a_parameter_forward(smollm2: StepCounter) -> None:
    matrices, short = 106_168_320, replace(DATA, supervised_tokens=0, tokens=0)
    full = figures.configured(settings(quantize={"precision": "bf16"}, train={"method": "full"}))
    short = replace(DATA, supervised_tokens=0, conversations=10**12)
    cost = figures.operations(smollm2, full, short)
    assert (cost["forward"], cost["backward"]) == (2 * matrices, 4 * matrices)
    lora = figures.configured(settings())
    cost = figures.operations(smollm2, lora, short)
    assert (cost["forward"], cost["second_forward"]) == (2 * (matrices + ADAPTER), 0)
    assert cost["backward"] == 2 * matrices + 4 * ADAPTER
    again = figures.operations(smollm2, replace(lora, gradient_checkpointing=True), short)
    assert again["second_forward"] == cost["forward"]


def test_three_checkpoints_of_12_bytes_a_parameter_fit_the_disk(smollm2: StepCounter) -> None:
    disk = figures.plan(smollm2, DATA, settings())["disk"]
    assert disk["checkpoint_bytes"] == 12 * ADAPTER
    assert disk["resume_state_bytes"] == 3 * 12 * ADAPTER + 2 * 4 * ADAPTER
    assert disk["merged_bytes"] == 2 * 134_515_008
    models = ("base", "quantized", "adapter", "merged")
    assert disk["cache_bytes"] == sum(disk[f"{name}_bytes"] for name in models)


def test_70b_fits_two_cards_of_24_gib_sharded() -> None:
    """With rank 8, 8-bit AdamW and 1,024 tokens; whole it fits neither 4 × 24 nor 8 × 40."""
    values = settings(lora={"r": 8}, train={"optimizer": "adamw_8bit"})
    long = replace(DATA, longest=1024)
    fits: dict[str, Any] = {}
    with StepCounter(CONFIGS / "Llama-3-70B.json") as counter:
        for count in (2, 4, 8):
            fits |= figures.on_devices(counter, long, values, count)
    for size in ("2 × 24 GiB", "4 × 24 GiB", "8 × 40 GiB"):
        assert fits[size]["sharded"]["fits"] and not fits[size]["whole"]["fits"], size
    assert not fits["2 × 16 GiB"]["sharded"]["fits"]
    assert fits["8 × 16 GiB"]["sharded"]["fits"]
    assert "22.71 GiB: micro-batches of 1,024 tokens, checkpointed" in output.devices(fits)
