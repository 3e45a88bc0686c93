"""What a block saves, against figures that were measured apart, in bytes a token."""

import pytest

from stages.shared import instants
from stages.shared.blocks import LINEAR, Block, Flow, Saved

SMOLLM2 = Block(hidden=576, query=576, key_value=192, inner=1536, heads=9)
ALL = frozenset(LINEAR)


def lora(**changes) -> Flow:
    values = {"stream": 2, "compute": 2, "rank": 16, "adapted": ALL}
    return Flow(**values | changes)  # type: ignore[arg-type]


def test_lora_under_autocast_saves_24h_4kv_8f_14r_4a_8_where_adapters_copy_their_input():
    h, kv, f, a, r = 576, 192, 1536, 9, 16
    saved = Saved(SMOLLM2, lora(widened=True)).total
    assert saved == 24 * h + 4 * kv + 8 * f + 14 * r + 4 * a + 8


def test_adapters_that_share_an_input_save_six_hidden_widths_less():
    copied, shared = (Saved(SMOLLM2, lora(widened=w, kernel=False)).total for w in (True, False))
    assert copied - shared == 2 * (2 * 576) + 2 * 576  # of q, k, v and of gate, up: one is enough


def test_the_result_of_attention_is_kept_once_by_the_kernel_and_the_product_after_it():
    products, kernel = (Saved(SMOLLM2, lora(kernel=k)).total for k in (False, True))
    assert kernel - products == 4 * 9  # the logarithms
    copied = Saved(SMOLLM2, lora(widened=True))
    assert copied.product_input(576, "o_proj", kept=True) == 2 * copied.product_input(576, "o_proj")
    alone = Saved(SMOLLM2, lora(rank=0, adapted=frozenset()))
    assert alone.product_input(576, "o_proj", kept=True) == 2 * 576


def test_without_an_adapter_no_input_is_kept():
    none = Saved(SMOLLM2, lora(rank=0, adapted=frozenset()))
    assert none.inputs(576, "q_proj", "k_proj", "v_proj") == 0
    assert none.product_input(1536, "down_proj") == 0
    some = Saved(SMOLLM2, lora(adapted=frozenset({"q_proj", "v_proj"})))
    assert some.inputs(576, "q_proj", "k_proj", "v_proj") == 2 * 576


def test_int8_products_keep_their_input_beside_an_adapters_copy():
    plain = Saved(SMOLLM2, lora(widened=True, kernel=False))
    int8 = Saved(SMOLLM2, lora(widened=True, kernel=False, keeps_input=True))
    assert int8.total - plain.total == int8.kept_by_products == 6 * 576 + 2 * 1536


def test_full_tuning_saves_the_result_of_each_norm_too():
    frozen = Saved(SMOLLM2, lora())
    trained = Saved(SMOLLM2, Flow(stream=4, compute=2, trained=True))
    assert trained.norm - frozen.norm == 4 * 576


def test_dropout_keeps_a_byte_an_element_on_cuda_and_a_factor_on_a_cpu():
    def kept(dropout: int) -> int:
        return Saved(SMOLLM2, lora(widened=True, dropout=dropout)).total

    widths = 5 * 576 + 576 + 1536
    assert kept(1) - kept(0) == widths
    assert kept(4) - kept(0) == 4 * widths


def test_norms_of_heads_as_in_qwen3_save_queries_and_keys_in_fp32():
    normed = Block(hidden=576, query=576, key_value=192, inner=1536, heads=9, head_norms=True)
    more = Saved(normed, lora()).total - Saved(SMOLLM2, lora()).total
    assert more == 4 * (576 + 192) + 4 * (9 + 3)


@pytest.mark.parametrize("tokens", [16, 4096])
def test_a_dequantized_matrix_is_the_peak_of_a_short_micro_batch_and_not_of_a_long_one(tokens):
    saved = Saved(SMOLLM2, lora())
    found = instants.forward(saved, workspace=2 * SMOLLM2.largest_matrix)
    most = max(found, key=lambda at: (at.saved + at.extra) * tokens + at.matrix)
    assert bool(most.matrix) == (tokens == 16)
