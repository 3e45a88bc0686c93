"""Hand-computed persistent bytes, and sizes of real models."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from stages.plan.config import CONFIGS
from stages.shared.model import loading
from stages.shared.step.memory import dry_run, fake_model, persistent
from stages.shared.step.memory.fake_model import Pattern
from stages.shared.step.memory.predict import StepCounter
from stages.shared.step.memory.setup import Stored, TrainingSetup, stored_as
from tests import tiny
from tests.architectures import BESIDES, OTHERS, SHAPE
from tests.shared.step.adapters import LORA

LLAMA_2_7B = 6_738_415_616
WHOLE = Pattern(layers=2, run=2)  # of the tiny model


def test_four_bits_round_up_to_whole_bytes_and_blocks() -> None:
    assert persistent.four_bit_bytes(65, False) == 33 + 8 + 64
    assert persistent.four_bit_bytes(64 * 256 + 1, True) == 8193 + 257 + 8 + 4 * 273


def test_8_bit_adamw_keeps_small_tensors_in_fp32() -> None:
    assert persistent.optimizer_bytes("adamw", [1000, 24]) == 8 * 1024
    assert persistent.optimizer_bytes("adamw_8bit", [1 << 20]) / (1 << 20) == 2.03125
    assert persistent.optimizer_bytes("adamw_8bit", [4095, 4096]) == 8 * 4095 + 2 * 4096 + 8 * 16
    assert persistent.pageable_bytes("adamw", [99_999, 100_000]) == 800_000


def held(name: str, setup: TrainingSetup) -> dict:
    with StepCounter(CONFIGS / f"{name}.json") as counter:
        return counter.persistent(setup)


def test_full_tuning_takes_16_bytes_a_parameter_and_pure_bf16_12() -> None:
    parts = ("weights", "adapter", "gradients", "optimizer")
    for setup, size in (
        (TrainingSetup("fp32", None, stored="fp32", compute="fp32"), 16),
        (TrainingSetup("bf16", None), 16),
        (TrainingSetup("bf16", None, masters=False), 12),
    ):
        sizes = held("Llama-2-7B", setup)
        assert sum(sizes[part] for part in parts) == size * LLAMA_2_7B


def test_mixtral_has_four_bits_a_parameter_of_its_experts() -> None:
    sizes = held("Mixtral-8x7B", TrainingSetup("nf4", LORA, double_quant=True))
    ends = 2 * (2 * 32_000 * 4096 + 32 * 8 * 4096)  # embedding, head and routers, in bf16
    assert sizes["weights"] == pytest.approx(46.44e9 * 4.127 / 8 + ends, rel=1e-3)
    each = 32 * 3 * 8 * (4096 + 14336) + 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    assert sizes["trainable"] == 16 * each


@pytest.mark.parametrize("changes", [{"dora": True}, {"target_modules": ["q_proj"]}])
def test_adapter_has_the_parameters_that_peft_trains(changes: dict) -> None:
    lora = LORA | {"r": 4} | changes
    setup = TrainingSetup("nf4", lora)
    model = dry_run.prepare(tiny.model().config, setup)
    adapter = persistent.persistent_bytes(setup, model, WHOLE)["adapter"]
    assert adapter == 4 * model.get_nb_trainable_parameters()[0]


def test_everything_trained_is_fp32_and_counts_once() -> None:
    lora = LORA | {"modules_to_save": ["lm_head", "embed_tokens"], "init": "pissa"}
    setup = TrainingSetup("bf16", lora)
    model = dry_run.prepare(tiny.model().config, setup)
    sizes = persistent.persistent_bytes(setup, model, WHOLE)
    assert sizes["gradients"] == 4 * sizes["trainable"]
    frozen_starts = sizes["adapter"] - 4 * sizes["trainable"]
    copies = 384 * 64  # both ends of a tie are one matrix
    assert frozen_starts == 4 * (sizes["trainable"] - copies)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen1.5-0.5B", 463_987_712),
        ("Llama-2-7B", LLAMA_2_7B),
        ("Mistral-7B", 7_241_732_096),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3-70B", 70_553_706_496),
        ("Mixtral-8x7B", 46_702_792_704),
    ],
)
def test_shipped_configs_have_the_published_parameters(name: str, parameters: int) -> None:
    with StepCounter(CONFIGS / f"{name}.json") as counter:
        model = counter.model()
    assert model["parameters"]["parameters"] == parameters
    if name == "Mixtral-8x7B":  # a token goes through two of eight experts
        experts, attention = 32 * 3 * 4096 * 14336, 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
        assert model["per_token"] == attention + 2 * experts


@pytest.mark.parametrize("kind", sorted({*BESIDES, *OTHERS} - {"mamba2"}))
def test_every_architecture_is_described(kind: str) -> None:
    """Its blocks are sizes, and the shortest run of them that stands for all."""
    config = CONFIG_MAPPING[kind](**SHAPE | (BESIDES | OTHERS)[kind])
    described = fake_model.describe(config)
    model = fake_model.model_on_meta(config, torch.float32)
    assert described["parameters"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert fake_model.pattern_of(config).layers == len(loading.blocks_of(model))


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("nf4", Stored("nf4", True, "bf16")),
        ("int8", Stored("int8", False, "bf16")),
        ("fp32", Stored("fp32", False, "fp32")),
    ],
)
def test_stored_precision_is_read_from_the_config(tmp_path, precision, expected) -> None:
    folder = tiny.quantize(tmp_path / "quantized", precision)
    assert stored_as(folder / "config.json") == expected
