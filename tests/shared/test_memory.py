"""Hand-computed figures for every term."""

import pytest

from stages.shared import memory
from stages.shared.tensors import Kind, Tensor, parameter_count

# A layer of SmolLM2-135M: q and o, k and v, gate and up, down. It has 30 of them.
SMOLLM2_LAYER = [
    *[(576, 576)] * 2,
    *[(192, 576)] * 2,
    *[(1536, 576)] * 2,
    (576, 1536),
]


def matrix(name: str, *shape: int, kind: Kind = "linear") -> Tensor:
    return Tensor(f"{name}.weight", kind, shape, quantizable=kind == "linear")


def test_seven_billion_parameters_in_fp32_with_gradients_and_two_adam_states_are_112_gb():
    parameters = 7_000_000_000
    total = (
        memory.dense_bytes(parameters, "fp32")
        + memory.gradients_bytes(parameters)
        + memory.adamw_bytes(parameters)
    )
    assert total == 112_000_000_000


def test_a_layer_of_1000_by_1000_at_rank_8_has_16000_adapter_parameters():
    assert sum(memory.lora_sizes(matrix("layer", 1000, 1000), 8)) == 16_000


def test_dora_adds_a_magnitude_for_each_of_the_300_outputs():
    assert memory.lora_sizes(matrix("layer", 300, 200), 4, dora=True) == [800, 1200, 300]


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4.127), (False, 4.5)])
def test_nf4_takes_4_127_bits_a_parameter_with_double_quantization_and_4_5_without(
    double_quant, bits
):
    parameters = 4096 * 4096
    measured = 8 * sum(memory.four_bit_bytes(parameters, double_quant)) / parameters
    assert measured == pytest.approx(bits, abs=5e-4)


def test_smollm2_in_nf4_is_53084160_codes_1658880_constants_26160_nested_constants():
    parts = [memory.four_bit_bytes(rows * columns, True) for rows, columns in SMOLLM2_LAYER * 30]
    assert sum(rows * columns for rows, columns in SMOLLM2_LAYER * 30) == 106_168_320
    assert [sum(part) for part in zip(*parts, strict=True)] == [53_084_160, 1_658_880, 26_160]


def test_an_odd_number_of_weights_is_rounded_up_to_whole_bytes_and_blocks():
    assert memory.four_bit_bytes(65, False) == (33, 8, 0)
    assert memory.four_bit_bytes(64 * 256 + 1, True) == (8193, 257, 8)


def test_int8_takes_a_byte_a_weight_and_4_a_row():
    assert memory.int8_bytes(192, 576) == 192 * 576 + 4 * 192


def test_only_what_is_quantizable_shrinks_and_the_rest_keeps_the_dense_precision():
    tensors = [matrix("q_proj", 64, 64), matrix("embed", 100, 64, kind="embedding")]
    assert memory.weights_bytes(tensors, "nf4") == 2048 + 4 * 64 + 64 + 2 * 6400
    assert memory.weights_bytes(tensors, "nf4", dense="fp32") == 2048 + 4 * 64 + 64 + 4 * 6400
    assert memory.weights_bytes(tensors, "int8") == 4096 + 4 * 64 + 2 * 6400
    assert memory.weights_bytes(tensors, "fp32") == 4 * (4096 + 6400)


def test_a_tied_head_is_counted_once():
    embedding = matrix("embed", 100, 64, kind="embedding")
    head = Tensor("lm_head.weight", "head", (100, 64), tied=True)
    assert parameter_count([embedding, head]) == 6400
    assert memory.weights_bytes([embedding, head], "bf16") == 12_800


def test_8_bit_adamw_takes_2_03_bytes_a_parameter_and_8_in_a_small_tensor():
    assert memory.adamw_8bit_bytes([1 << 20]) / (1 << 20) == 2.03125
    assert memory.adamw_8bit_bytes([4095]) == 8 * 4095
    assert memory.adamw_8bit_bytes([4096]) == 2 * 4096 + 8 * 16
