"""Packed conversations neither see nor change each other."""

from itertools import chain

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from stages.shared.model import attention, packing, scoring
from stages.shared.model.packing import Example
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(params=["sdpa", attention.NAME])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    """The library's own path, and ours; what is asserted of packing holds on both."""
    made = tiny.model()
    made.set_attn_implementation(request.param)
    return made


def conversations(lengths: tuple[int, ...] = (9, 4, 17, 6)) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(rng.integers(3, 384, n), rng.random(n) < 0.6, row) for row, n in enumerate(lengths)
    ]


def computed(lengths: tuple[int, ...]) -> list[Example]:
    """So many tokens of each go through the model, and one more is predicted."""
    return [
        Example(np.zeros(n + 1, dtype=np.int64), np.arange(n + 1) == n, row)
        for row, n in enumerate(lengths)
    ]


def test_positions_restart_and_targets_follow_their_predictors() -> None:
    first = Example(np.array([5, 6, 7]), np.array([True, False, True]), 0)
    second = Example(np.array([8, 9]), np.array([True, True]), 1)
    packed = packing.pack([first, second], CPU)
    # Token 7 is predicted at position 1, token 9 at position 2; a first token by nothing at all,
    # and the last ones are there to be predicted.
    assert packed.input_ids.tolist() == [[5, 6, 8]]
    assert packed.position_ids.tolist() == [[0, 1, 0]]
    assert packed.lengths == (2, 1)
    assert packed.predictors.tolist() == [1, 2]
    assert packed.targets.tolist() == [7, 9]
    assert packed.rows.tolist() == [0, 1]
    assert (first.supervised_tokens, second.supervised_tokens) == (1, 1)


def test_what_follows_the_last_learnt_token_is_not_computed_and_changes_nothing(
    model: LlamaForCausalLM,
) -> None:
    ids, learnt = np.arange(3, 15), np.arange(12)
    example = Example(ids, (learnt > 4) & (learnt < 9), 0)
    batch = packing.pack([example], CPU)
    assert batch.input_ids.tolist() == [[*range(3, 11)]]  # token 11, the last learnt, is predicted
    scoring.negative_log_likelihoods(model, batch).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    logits = model(torch.from_numpy(ids)[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="none")
    losses[torch.from_numpy(example.loss_mask[1:])].sum().backward()
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        assert (found - parameter.grad).norm() < 1e-5 * found.norm()


def test_packed_losses_and_gradients_equal_those_of_each_conversation_alone(
    model: LlamaForCausalLM,
) -> None:
    examples = conversations()

    def gradients(groups: list[list[Example]]) -> tuple[dict[int, list[float]], torch.Tensor]:
        model.zero_grad()
        losses: dict[int, list[float]] = {}
        for group in groups:
            batch = packing.pack(group, CPU)
            values = scoring.negative_log_likelihoods(model, batch)
            values.sum().backward()
            for row, value in zip(batch.rows.tolist(), values.tolist(), strict=True):
                losses.setdefault(row, []).append(value)
        return losses, torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )

    alone, alone_gradient = gradients([[e] for e in examples])
    packed, packed_gradient = gradients([examples])
    for row, losses in alone.items():
        assert packed[row] == pytest.approx(losses, rel=1e-5, abs=1e-5)
    difference = (packed_gradient - alone_gradient).norm() / alone_gradient.norm()
    assert difference < 1e-5


def test_a_changed_word_changes_no_logit_of_a_neighbour(model: LlamaForCausalLM) -> None:
    examples = conversations()
    changed = Example((examples[1].input_ids + 1) % 384, examples[1].loss_mask, 1)
    with torch.inference_mode():
        before = packing.pack(examples, CPU)
        after = packing.pack([examples[0], changed, *examples[2:]], CPU)
        logits = scoring.supervised_logits(model, before)
        other = scoring.supervised_logits(model, after)
    neighbours = before.rows != 1
    assert torch.equal(logits[neighbours], other[neighbours])
    assert not torch.equal(logits[~neighbours], other[~neighbours])


def test_an_attention_mask_of_all_ones_would_let_conversations_see_each_other() -> None:
    """The trap that `supervised_logits` avoids by giving no mask at all."""
    examples = conversations()
    batch, model = packing.pack(examples, CPU), tiny.model()
    with torch.inference_mode():
        right = scoring.supervised_logits(model, batch)
        masked = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=torch.ones_like(batch.input_ids),
            logits_to_keep=batch.predictors,
        ).logits[0]
    assert not torch.allclose(right, masked, atol=1e-3)


def test_a_sliding_window_is_kept_to() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        initializer_range=0.2,
    )
    model, batch = MistralForCausalLM(config).eval(), packing.pack(conversations(), CPU)
    logits = []
    for name in ("eager", "sdpa", attention.NAME):
        model.set_attn_implementation(name)
        with torch.inference_mode():
            logits.append(scoring.supervised_logits(model, batch))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], logits[2])


@pytest.mark.parametrize("max_tokens", [1, 10, 20, 36])
def test_split_loses_nothing_and_keeps_to_the_limit(max_tokens: int) -> None:
    examples = conversations()
    groups = packing.bins(examples, max_tokens)
    assert sorted(e.row for group in groups for e in group) == [0, 1, 2, 3]
    for group in groups:
        assert sum(e.input_tokens for e in group) <= max_tokens or len(group) == 1


def test_score_is_the_mean_over_tokens_and_leaves_the_model_in_its_mode() -> None:
    model, examples = tiny.model().train(), conversations()
    sums, tokens = scoring.score(model, examples, CPU, torch.float32, "test")
    assert model.training
    expected = []
    for example in examples:
        ids = torch.from_numpy(example.input_ids)[None]
        with torch.inference_mode():
            likely = model.eval()(ids).logits[0, :-1].log_softmax(-1)
        chosen = likely.gather(1, ids[0, 1:, None])[:, 0]
        expected.append(-chosen[torch.from_numpy(example.loss_mask[1:])].sum().item())
    assert sums == pytest.approx(expected, rel=1e-5)
    assert scoring.mean_loss(sums, tokens) == pytest.approx(sum(expected) / tokens.sum(), rel=1e-5)


def test_those_that_work_side_by_side_get_equal_parts() -> None:
    """The longest first to the emptier one would give 17 and 13."""
    first, second = packing.partition(computed((8, 7, 6, 5, 4)), 11, 2)
    lengths = [[[e.input_tokens for e in batch] for batch in part] for part in (first, second)]
    assert sorted(chain(*lengths[0], *lengths[1])) == [4, 5, 6, 7, 8]
    assert [sum(map(sum, part)) for part in lengths] == [15, 15]
    assert all(sum(batch) <= 11 for part in lengths for batch in part)


@pytest.mark.parametrize(
    ("lengths", "workers"),
    [((9,), 1), ((9, 4), 1), ((9, 9), 2), ((9, 9, 9), 3), ((30, 10, 10, 10), 2)],
)
def test_fewer_work_where_parts_would_be_uneven(lengths: tuple[int, ...], workers: int) -> None:
    parts = packing.partition(computed(lengths), 100, 3)
    assert len(parts) == workers
    rows = [e.row for part in parts for batch in part for e in batch]
    assert sorted(rows) == list(range(len(lengths)))


def test_one_alone_has_all_micro_batches() -> None:
    examples = conversations()
    assert packing.partition(examples, 20, 1) == [packing.bins(examples, 20)]


def test_one_alone_needs_no_more_at_once_than_each_of_several_would() -> None:
    [alone] = packing.partition(computed((30, 10, 10, 2)), 100, 2)
    assert [[e.input_tokens for e in batch] for batch in alone] == [[30], [10, 10, 2]]
