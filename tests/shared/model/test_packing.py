"""Packed conversations neither see nor change each other, in any architecture."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from stages.shared.model import attention, loading, packing, scoring
from stages.shared.model.packing import PACKING, Example
from tests import tiny
from tests.architectures import BESIDES, OTHERS, random, saved

CPU = torch.device("cpu")


@pytest.fixture(params=["sdpa", attention.NAME])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    """With the library's attention, and with ours."""
    made = tiny.model()
    made.set_attn_implementation(request.param)
    return made


def conversations(lengths: tuple[int, ...] = (9, 4, 17, 6)) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(rng.integers(3, 384, n), rng.random(n) < 0.6, row) for row, n in enumerate(lengths)
    ]


def of_input_tokens(*lengths: int) -> list[Example]:
    """So many tokens of each go through the model, and one more is predicted."""
    return [
        Example(np.zeros(n + 1, dtype=np.int64), np.arange(n + 1) == n, row)
        for row, n in enumerate(lengths)
    ]


def gradient(model: LlamaForCausalLM) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_pack_restarts_positions_and_aligns_targets() -> None:
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


def test_tokens_after_the_last_supervised_one_are_skipped(model: LlamaForCausalLM) -> None:
    """They change neither losses nor gradients."""
    ids, at = np.arange(3, 15), np.arange(12)
    example = Example(ids, (at > 4) & (at < 9), 0)
    batch = packing.pack([example], CPU)
    assert batch.input_ids.tolist() == [[*range(3, 11)]]  # token 11, the last, is predicted
    scoring.negative_log_likelihoods(model, batch).sum().backward()
    packed = gradient(model)
    model.zero_grad()
    logits = model(torch.from_numpy(ids)[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="none")
    losses[torch.from_numpy(example.loss_mask[1:])].sum().backward()
    assert (packed - gradient(model)).norm() < 1e-5 * packed.norm()


def test_packed_losses_and_gradients_equal_each_alone(model: LlamaForCausalLM) -> None:
    def losses_and_gradient(
        groups: list[list[Example]],
    ) -> tuple[dict[int, list[float]], torch.Tensor]:
        model.zero_grad()
        losses: dict[int, list[float]] = {}
        for group in groups:
            batch = packing.pack(group, CPU)
            values = scoring.negative_log_likelihoods(model, batch)
            values.sum().backward()
            for row, value in zip(batch.rows.tolist(), values.tolist(), strict=True):
                losses.setdefault(row, []).append(value)
        return losses, gradient(model)

    examples = conversations()
    alone, alone_gradient = losses_and_gradient([[e] for e in examples])
    packed, packed_gradient = losses_and_gradient([examples])
    for row, losses in alone.items():
        assert packed[row] == pytest.approx(losses, rel=1e-5, abs=1e-5)
    assert (packed_gradient - alone_gradient).norm() < 1e-5 * alone_gradient.norm()


def test_changed_word_changes_no_logit_of_a_neighbour(model: LlamaForCausalLM) -> None:
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


def test_sliding_window_is_kept_to() -> None:
    model, batch = random("mistral", {"sliding_window": 4}), packing.pack(conversations(), CPU)
    logits = []
    for name in ("eager", "sdpa", attention.NAME):
        model.set_attn_implementation(name)
        with torch.inference_mode():
            logits.append(scoring.supervised_logits(model, batch))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], logits[2])


MODELS = [(kind, True) for kind in sorted(PACKING)] + [(kind, False) for kind in OTHERS]


@pytest.mark.parametrize(("kind", "packs"), MODELS)
@torch.no_grad()
def test_architecture_keeps_conversations_apart(tmp_path: Path, kind: str, packs: bool) -> None:
    """Against each by itself, with the attention that is written out in the library."""
    folder = saved(tmp_path, kind, BESIDES.get(kind, {}) if packs else OTHERS[kind])
    drawn = np.random.default_rng(0)
    lengths = (40, 30, 9, 5)
    examples = [
        Example(drawn.integers(3, 384, n), np.arange(n) > 2, i) for i, n in enumerate(lengths)
    ]
    losses = []
    for example in examples:
        # Anew: dynamic rotary frequencies would be those of the longest one so far.
        library = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        ids = torch.tensor(example.input_ids)
        seen = ids[None, : example.input_tokens]
        likely = library(input_ids=seen, use_cache=False).logits[0].float().log_softmax(-1)
        losses.append(-likely[example.predictors, ids[1:][example.predictors]])

    model = loading.load_model(folder, CPU, torch.float32)
    assert packing.may_pack(model.config) is packs
    rows = packing.packed_rows(model.config, examples, CPU)
    packed = torch.cat([scoring.negative_log_likelihoods(model, row) for row in rows])
    torch.testing.assert_close(packed, torch.cat(losses), atol=5e-5, rtol=0)


def test_score_is_a_mean_over_tokens_and_keeps_the_mode() -> None:
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


@pytest.mark.parametrize("max_tokens", [1, 10, 20, 36])
def test_bins_lose_nothing_and_keep_to_the_limit(max_tokens: int) -> None:
    groups = packing.bins(conversations(), max_tokens)
    assert sorted(e.row for group in groups for e in group) == [0, 1, 2, 3]
    for group in groups:
        assert packing.input_tokens(group) <= max_tokens or len(group) == 1


@pytest.mark.parametrize("packs", [True, False])
def test_even_passes_gives_every_device_as_many(packs: bool) -> None:
    """A micro-batch of a model that cannot pack is a pass for each of its conversations."""
    parts = [[of_input_tokens(8, 7)], [of_input_tokens(6), of_input_tokens(5)], []]
    even = packing.even_passes(parts, packs)
    assert [len(p) if packs else sum(map(len, p)) for p in even] == [2, 2, 2]
    assert even[2] == [[packing.IDLE]] * 2
    assert not packing.IDLE.supervised_tokens


def test_partition_gives_the_longest_to_the_emptiest() -> None:
    parts = packing.partition(of_input_tokens(4, 5, 6, 7, 8), 11, 2)
    lengths = [[[e.input_tokens for e in batch] for batch in part] for part in parts]
    assert [sorted(chain(*part)) for part in lengths] == [[4, 5, 8], [6, 7]]
    assert all(sum(batch) <= 11 for part in lengths for batch in part)
