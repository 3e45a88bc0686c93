"""The plan's figures, of SmolLM2-135M's shape and of well-known models."""

import json
from dataclasses import replace
from typing import Any

import pytest

from stages.plan import data, figures, operations, table, techniques
from stages.shared.core.errors import UserError
from stages.shared.step.adapter_sizes import Adapter, of_parameters
from stages.shared.tensors import Tensor
from stages.shared.tuning import Tuning
from stages.shared.workspace import MicroBatch
from tests.plan.cases import DATA, SMOLLM2, settings, shipped


def test_smollm2_has_134515008_parameters_and_the_adapter_4884480():
    plan = figures.plan(SMOLLM2, DATA, settings())
    assert plan["model"]["parameters"] == 134_515_008
    assert plan["model"]["quantizable"] == 106_168_320
    assert plan["model"]["attention"] == 30 * (2 * 576 * 576 + 2 * 192 * 576)
    assert plan["model"]["mlp"] == 30 * 3 * 576 * 1536
    assert plan["model"]["tied_head"] is True
    assert plan["adapter"]["parameters"] == 16 * 30 * (2 * 1152 + 2 * 768 + 3 * 2112) == 4_884_480


def test_qlora_on_smollm2_keeps_54769200_bytes_of_matrices_and_a_dense_embedding():
    way = figures.plan(SMOLLM2, DATA, settings())["techniques"]["qlora_nf4_double"]
    dense = 2 * (49152 * 576 + 61 * 576)
    tables = 210 * 4 * (16 + 256 + 1)
    assert way["weights_bytes"] == 53_084_160 + 1_658_880 + 26_160 + tables + dense
    assert way["adapter_bytes"] == way["gradients_bytes"] == 4 * 4_884_480
    assert way["optimizer_bytes"] == 8 * 4_884_480
    assert way["persistent_bytes"] == way["weights_bytes"] + 16 * 4_884_480
    assert way["peak_bytes"] > way["persistent_bytes"]


def test_full_tuning_takes_16_bytes_a_parameter_in_mixed_precision_and_12_in_pure_bf16():
    ways = figures.plan(SMOLLM2, DATA, settings())["techniques"]
    assert ways["full_fp32"]["persistent_bytes"] == 16 * 134_515_008
    assert ways["full_mixed"]["persistent_bytes"] == 16 * 134_515_008
    assert ways["full_bf16"]["persistent_bytes"] == 12 * 134_515_008


def test_llama_2_7b_in_fp32_with_gradients_and_two_adam_states_is_107_8_gb_decimal():
    way = Tuning("fp32", None).persistent(shipped("Llama-2-7B"))
    assert way.persistent_bytes == 16 * 6_738_415_616
    assert round(way.persistent_bytes / 1e9, 1) == 107.8


def test_llama_2_7b_at_16_bits_is_half_of_fp32_and_its_matrices_at_8_bits_a_quarter():
    def weights(precision: Any) -> int:
        model = shipped("Llama-2-7B")
        matrices = replace(model, tensors=[t for t in model.tensors if t.quantizable])
        return Tuning(precision, None, masters=False).persistent(matrices).weights_bytes

    adapter = Adapter([], [], [], [], rank=1, layers=frozenset())
    model = shipped("Llama-2-7B")
    matrices = replace(model, tensors=[t for t in model.tensors if t.quantizable])
    int8 = Tuning("int8", adapter).persistent(matrices).weights_bytes
    assert weights("bf16") == weights("fp32") / 2
    assert int8 / weights("fp32") == pytest.approx(0.25, rel=2e-3)  # and a constant a row


def test_mixtral_8x7b_does_not_fit_65_gb_at_16_bits_and_does_at_4_as_arithmetic():
    model = shipped("Mixtral-8x7B")
    parameters = sum(t.size for t in model.tensors)
    assert 2 * parameters > 65e9 > parameters / 2
    # The libraries leave its fused experts dense, and so does the plan.
    adapter = of_parameters(model.tensors, settings().lora)
    built = Tuning("nf4", adapter, double_quant=True).persistent(model).weights_bytes
    assert built > 90e9


def test_blocks_that_were_not_measured_get_a_range_and_the_word_uncalibrated():
    plan = figures.plan(shipped("Mixtral-8x7B"), DATA, settings())
    way = plan["techniques"]["qlora_nf4"]
    assert way["calibrated"] is False
    assert way["peak_at_least_bytes"] < 0.99 * way["peak_bytes"]
    known = figures.plan(SMOLLM2, DATA, settings())["techniques"]["qlora_nf4"]
    assert known["calibrated"] is True
    assert known["peak_at_least_bytes"] == known["peak_bytes"]


def test_configured_is_what_params_yaml_says():
    ways = figures.plan(SMOLLM2, DATA, settings())["techniques"]
    assert ways["configured"] == ways["qlora_nf4_double"]
    ways = figures.plan(SMOLLM2, DATA, settings(quantize={"precision": "int8"}))["techniques"]
    assert ways["configured"] == ways["lora_int8"]
    full = settings(quantize={"precision": "bf16"}, train={"method": "full"})
    ways = figures.plan(SMOLLM2, DATA, full)["techniques"]
    assert ways["configured"] == ways["full_mixed"]
    ways = figures.plan(SMOLLM2, DATA, settings(train={"optimizer": "adamw_8bit"}))["techniques"]
    assert ways["configured"]["optimizer_bytes"] < ways["qlora_nf4_double"]["optimizer_bytes"] / 3


def test_a_paged_optimizer_leaves_only_small_tensors_on_the_device():
    model = shipped("Llama-3-8B")
    adapter = of_parameters(model.tensors, settings().lora)
    ways = techniques.standard(adapter)
    small = sum(size for size in adapter.sizes if size < 100_000)
    paged = ways["qlora_nf4_double_checkpointed_paged"].persistent(model)
    assert paged.optimizer_bytes == 8 * small
    assert small < adapter.trainable / 2


def test_each_card_gets_the_fastest_settings_that_fit_it():
    plan = figures.plan(shipped("Llama-3-8B"), replace(DATA, longest=4096), settings())
    cards = plan["configured_on"]
    assert cards["T4_16GiB"]["gradient_checkpointing"] is True
    assert cards["A100_40GiB"]["gradient_checkpointing"] is False
    assert cards["T4_16GiB"]["peak_bytes"] < 16 * 2**30
    full = settings(quantize={"precision": "bf16"}, train={"method": "full"})
    cards = figures.plan(shipped("Llama-3-8B"), DATA, full)["configured_on"]
    assert cards["H100_80GiB"]["fits"] is False


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
def test_a_card_without_bf16_says_what_it_needs_instead(quantize, method, instead):
    given = settings(quantize=quantize, train={"method": method})
    plan = figures.plan(SMOLLM2, DATA, given)
    found = {card: one["instead_of_bf16"] for card, one in plan["configured_on"].items()}
    assert found == {card: instead if card == "T4_16GiB" else None for card in found}
    line = next(line for line in table.configured(plan).splitlines() if "T4" in line)
    assert (f"; it has no bf16: set {instead}" in line) == (instead is not None)


def test_a_card_must_hold_an_assumed_context_beside_the_tensors():
    model, tuning = SMOLLM2, Tuning("nf4", None)
    from stages.shared.peak import Prediction

    just = Prediction({"weights": 16 * 2**30}, "", True, 0)
    assert techniques.cards_that_fit(model, tuning, just)["T4_16GiB"] is False
    less = Prediction({"weights": 15 * 2**30}, "", True, 0)
    assert all(techniques.cards_that_fit(model, tuning, less).values())


def test_a_part_of_a_batch_is_a_step_and_max_steps_is_a_limit():
    assert data.schedule(DATA, settings().train)["steps"] == 94
    assert data.schedule(DATA, settings(train={"epochs": 3}).train)["steps"] == 282
    assert data.schedule(DATA, settings(train={"max_steps": 10}).train)["steps"] == 10
    assert data.schedule(DATA, settings().train)["tokens_per_step"] == 64 * 16


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
        return of_parameters(tensors, chosen.lora).trainable

    assert trainable() == 16
    assert trainable(bias="lora_only") == 16 + 8
    assert trainable(bias="all") == 16 + 16
    assert trainable(modules_to_save=["lm_head"]) == 16 + 256
    assert trainable(dora=True) == 16 + 8


def test_all_that_is_trained_is_fp32_and_an_anchored_start_is_carried_along():
    adapter = Adapter([10], [], [100], [1], rank=1, layers=frozenset())
    way = Tuning("nf4", adapter, compute="bf16").persistent(SMOLLM2)
    assert way.adapter_bytes == 4 * 10 + 4 * 100 + 2 * 1  # a bias is in the weights, in bf16
    assert way.gradients_bytes == 4 * 111
    anchored = replace(adapter, anchored=True)
    assert Tuning("nf4", anchored).persistent(SMOLLM2).adapter_bytes == way.adapter_bytes + 40


def test_targets_that_match_nothing_are_named_with_what_there_is():
    with pytest.raises(UserError, match=r"lora\.target_modules is \['qkv'\].*down_proj, gate_proj"):
        figures.plan(SMOLLM2, DATA, settings(lora={"target_modules": ["qkv"]}))


def test_full_tuning_of_quantized_weights_is_refused():
    with pytest.raises(
        UserError, match=r"train\.method is 'full' and quantize\.precision is 'nf4'"
    ):
        figures.plan(SMOLLM2, DATA, settings(train={"method": "full"}))


def test_counts_without_training_rows_are_refused():
    for counts in ({}, {"train": {"conversations": 0, "tokens": 0}}):
        with pytest.raises(UserError, match=r"reports/prepare\.json: no train\.conversations"):
            data.of_counts(counts)


def test_missing_or_broken_counts_are_told_in_one_line(tmp_path):
    path = tmp_path / "prepare.json"
    for text in (None, "{"):
        if text:
            path.write_text(text)
        with pytest.raises(UserError, match="missing or not JSON"):
            data.read_counts(path)


def test_a_token_costs_2_operations_a_parameter_forward_and_twice_that_backward_if_all_is_trained():
    matrices = 106_168_320
    cost = operations.of_token(SMOLLM2, Tuning("bf16", None), 0.0, mean_length=0)
    assert (cost.forward, cost.backward) == (2 * matrices, 4 * matrices)
    adapter = Adapter([1000], [], [], [], rank=1, layers=frozenset())
    cost = operations.of_token(SMOLLM2, Tuning("nf4", adapter), 0.0, mean_length=0)
    assert (cost.forward, cost.backward) == (2 * matrices + 2000, 2 * matrices + 4000)
    assert cost.second_forward == 0
    checkpointed = Tuning("nf4", adapter, gradient_checkpointing=True)
    again = operations.of_token(SMOLLM2, checkpointed, 0.0, mean_length=0)
    assert again.second_forward == cost.forward


def test_a_token_of_mixtral_goes_through_two_of_its_eight_experts():
    model = shipped("Mixtral-8x7B")
    experts = 32 * 3 * 4096 * 14336
    attention = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
    assert operations.block_parameters(model) == attention + 2 * experts


def test_a_checkpoint_holds_12_bytes_a_trained_parameter_and_three_fit_on_the_disk_at_once():
    disk = figures.plan(SMOLLM2, DATA, settings())["disk"]
    assert disk["checkpoint_bytes"] == 12 * 4_884_480
    assert disk["resume_state_bytes"] == 3 * 12 * 4_884_480 + 2 * 4 * 4_884_480
    assert disk["merged_bytes"] == 2 * 134_515_008
    models = ("base", "quantized", "adapter", "merged")
    assert disk["cache_bytes"] == sum(disk[f"{name}_bytes"] for name in models)


def test_the_figures_are_json_and_hold_nothing_of_this_machine():
    plan = figures.plan(SMOLLM2, DATA, settings())
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    assert plan == figures.plan(SMOLLM2, DATA, settings())
    batch = MicroBatch(**plan["micro_batch"])
    assert batch.tokens <= figures.MICRO_BATCH_TOKENS
