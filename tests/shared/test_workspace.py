"""Hand-computed terms outside the blocks, and the instants they belong to."""

from dataclasses import replace

import numpy as np

from stages.shared import instants, peak, step_phases, workspace
from stages.shared.blocks import LINEAR, Block, Flow, Saved
from stages.shared.step.adapter_sizes import Adapter, adapter_of
from stages.shared.tensors import Tensor
from stages.shared.tuning import Tuning
from stages.shared.workspace import MicroBatch
from tests.plan.cases import SMOLLM2

ADAPTER = adapter_of(SMOLLM2.tensors, rank=16)
QLORA = Tuning("nf4", ADAPTER, double_quant=True, device="cpu")
PLAIN = replace(QLORA, fusing=False)
FULL = Tuning("bf16", None, device="cpu")
HEAD = 49152 * 576


def test_1000_supervised_tokens_of_a_vocabulary_of_128256_take_1_54_gb_in_backward():
    assert workspace.loss_backward_bytes(128_256, 1000) == 1_539_072_000
    assert workspace.loss_forward_bytes(128_256, 1000) == 1_026_048_000


def test_a_matrix_of_smollm2_is_dequantized_into_1_8_mb_and_a_dense_one_not_at_all():
    assert workspace.dequantized_bytes(576 * 1536, PLAIN) == 2 * 884_736 + 4 * 13_824
    # Fused, on a CPU, the constants are dequantized once and for all.
    assert workspace.dequantized_bytes(576 * 1536, QLORA) == 2 * 884_736
    single = replace(QLORA, double_quant=False)
    assert workspace.dequantized_bytes(576 * 1536, single) == 2 * 884_736
    assert workspace.dequantized_bytes(576 * 1536, replace(QLORA, precision="bf16")) == 0


def test_the_gradient_of_a_tied_head_waits_for_the_embedding_and_both_are_added_up():
    assert workspace.waiting_gradient_bytes(SMOLLM2, FULL) == 4 * HEAD
    assert workspace.embedding_gradient_bytes(SMOLLM2, FULL) == 3 * 4 * HEAD
    untied = replace(SMOLLM2, tensors=SMOLLM2.tensors[:-1])
    assert workspace.waiting_gradient_bytes(untied, FULL) == 0
    assert workspace.embedding_gradient_bytes(untied, FULL) == 4 * HEAD
    assert workspace.waiting_gradient_bytes(SMOLLM2, QLORA) == 0


def test_the_waiting_gradient_stands_in_the_backward_pass_of_blocks_and_not_in_the_forward():
    found = list(step_phases.instants_of(SMOLLM2, FULL, MicroBatch(16, 8)))
    matrices = 2 * 106_168_320  # copies of autocast
    head = 2 * HEAD
    assert dict(found)["loss"]["workspace"] == matrices + head
    backward = [parts["workspace"] for name, parts in found if name == "backward pass of a block"]
    assert min(backward) == matrices + 4 * HEAD


def test_what_is_trained_is_copied_and_nothing_in_fp32():
    assert workspace.block_copies_bytes(SMOLLM2, PLAIN) == 2 * 4_884_480
    assert workspace.block_copies_bytes(SMOLLM2, replace(PLAIN, precision="fp32")) == 0
    # The fused step keeps them on a GPU; on a CPU they are a product's own, for as long.
    assert workspace.block_copies_bytes(SMOLLM2, replace(QLORA, device="cpu")) == 0
    assert workspace.block_copies_bytes(SMOLLM2, replace(QLORA, device="cuda")) == 2 * 4_884_480
    assert workspace.head_copy_bytes(SMOLLM2, FULL) == 2 * HEAD
    assert workspace.head_copy_bytes(SMOLLM2, QLORA) == 0


def test_adamw_needs_no_room_and_8_bit_adamw_on_a_cpu_20_bytes_of_the_largest_tensor():
    sizes = [100_000, 300_000, 200_000]
    tuning = replace(QLORA, adapter=Adapter(sizes, [], [], [], rank=1, layers=frozenset()))
    assert workspace.optimizer_step_bytes(SMOLLM2, tuning) == 0
    eight_bit = replace(tuning, optimizer="adamw_8bit")
    assert workspace.optimizer_step_bytes(SMOLLM2, eight_bit) == 20 * 300_000
    assert workspace.optimizer_step_bytes(SMOLLM2, replace(tuning, device="cuda")) == 0


def test_the_mask_of_a_packed_row_of_32768_tokens_is_a_gibibyte_that_the_fused_step_does_without():
    batch = MicroBatch(32_768, 100, (8, 4096))
    assert workspace.mask_bytes(SMOLLM2, PLAIN, batch) == 2**30
    assert workspace.mask_bytes(SMOLLM2, QLORA, batch) == 0
    windowed = replace(SMOLLM2, window=2048)
    assert workspace.mask_bytes(windowed, QLORA, batch) == 2**30
    assert workspace.mask_bytes(windowed, replace(QLORA, device="cuda"), batch) == 0


def test_checkpointing_stores_the_input_of_each_block_and_what_int8_products_keep_anyway():
    batch = MicroBatch(1000, 500)
    checkpointed = replace(QLORA, gradient_checkpointing=True)
    assert step_phases.stored_bytes(SMOLLM2, checkpointed, batch) == 1000 * 30 * 2 * 576
    int8 = replace(checkpointed, precision="int8")
    kept = 2 * 2 * 576 + 2 * (576 + 1536)
    assert step_phases.stored_bytes(SMOLLM2, int8, batch) == 1000 * 30 * (2 * 576 + kept)


def test_an_int8_product_keeps_its_input_through_its_backward_pass_unless_it_was_recomputed():
    block = Block(hidden=576, query=576, key_value=192, inner=1536, heads=9)
    flow = Flow(2, 2, rank=8, adapted=frozenset(LINEAR), keeps_input=True)
    saved = Saved(block, flow)
    once = instants.backward(saved, 0, recomputed=False)[0].saved
    again = instants.backward(saved, 0, recomputed=True)[0].saved
    assert once - again == 2 * 1536


def test_the_parts_of_a_prediction_add_up_and_the_persistent_ones_are_those_of_the_tuning():
    prediction = peak.predict(SMOLLM2, QLORA, MicroBatch(512, 256))
    assert set(prediction.parts) == set(peak.PARTS)
    assert prediction.total_bytes == sum(prediction.parts.values()) == prediction.lowest_bytes
    assert prediction.parts["optimizer"] == 8 * 4_884_480
    long, learnt = MicroBatch(1024, 10), MicroBatch(512, 500)
    for batches in ([long, learnt], [learnt, long]):
        most = peak.largest(SMOLLM2, QLORA, batches)
        assert most == peak.predict(SMOLLM2, QLORA, long)
        assert most.total_bytes > peak.predict(SMOLLM2, QLORA, learnt).total_bytes


def test_options_that_were_not_measured_widen_the_prediction():
    plain = peak.predict(SMOLLM2, QLORA, MicroBatch(512, 256))
    tensors = [*SMOLLM2.tensors, Tensor("x.bias", "bias", (1,))]
    for option in ({"dora": True}, {"init": "pissa"}, {"modules_to_save": ["lm_head"]}):
        adapter = adapter_of(tensors, rank=16, **option)
        tuning = replace(QLORA, adapter=adapter)
        prediction = peak.predict(SMOLLM2, tuning, MicroBatch(512, 256))
        assert not prediction.calibrated
        assert plain.total_bytes < prediction.lowest_bytes < prediction.total_bytes
    assert not peak.predict(replace(SMOLLM2, window=256), QLORA, MicroBatch(512, 9)).calibrated


def test_of_many_micro_batches_the_few_that_no_other_outdoes_decide():
    random = np.random.default_rng(0)
    sizes = [(int(n), int(random.integers(0, n))) for n in random.integers(1, 2000, 300)]
    batches = [MicroBatch(tokens, supervised) for tokens, supervised in sizes]
    few = peak.undominated(batches)
    assert 1 < len(few) < 40
    for batch in batches:
        assert any(b.tokens >= batch.tokens and b.supervised >= batch.supervised for b in few)
    every = (peak.predict(SMOLLM2, QLORA, batch).total_bytes for batch in batches)
    assert peak.largest(SMOLLM2, QLORA, batches).total_bytes == max(every)
