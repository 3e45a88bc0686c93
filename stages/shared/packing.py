"""Conversations laid end to end in one row, with no padding and without seeing each other.

Of each, what goes through the model is what something learnt can see (`Example.input_tokens`);
that is what its tokens are here.

Positions restart with each conversation. Given these positions and no attention mask,
transformers builds an attention mask that is causal inside each conversation and closed between
them (`find_packed_sequence_indices` in `transformers.masking_utils`); an attention mask, even one
of all ones, would switch that off. `stages/shared/attention.py` goes by `lengths` where it can.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from stages.shared.examples import Example
from stages.shared.transfer import to_device

UNEVEN = 1.1  # of what all would have if it were divided evenly, one has at most so much


@dataclass(frozen=True)
class Packed:
    """A micro-batch.

    Attributes:
        input_ids: int64 [1, tokens].
        position_ids: int64 [1, tokens], from 0 in each conversation.
        predictors: int64 [supervised], the positions whose logits predict a supervised token.
        targets: int64 [supervised], the tokens they should predict.
        rows: int64 [supervised], the row of the conversation that each belongs to; on the host,
            where losses are added up.
        lengths: tokens of each conversation, in order.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    lengths: tuple[int, ...]


def pack(examples: Sequence[Example], device: torch.device) -> Packed:
    """Lay conversations end to end."""
    lengths = [e.input_tokens for e in examples]
    starts = accumulate(lengths[:-1], initial=0)
    ids = np.concatenate([e.input_ids[: e.input_tokens] for e in examples])
    positions = np.concatenate([np.arange(length) for length in lengths])
    predictors = np.concatenate([s + e.predictors for s, e in zip(starts, examples, strict=True)])
    targets = np.concatenate([e.input_ids[1:][e.predictors] for e in examples])
    rows = np.repeat([e.row for e in examples], [e.supervised_tokens for e in examples])

    return Packed(
        input_ids=to_device(ids, device)[None],
        position_ids=to_device(positions, device)[None],
        predictors=to_device(predictors, device),
        targets=to_device(targets, device),
        rows=torch.from_numpy(rows),
        lengths=tuple(lengths),
    )


def apart(batch: Packed) -> Iterator[Packed]:
    """Each conversation of a row in a row of its own, in their order."""
    for start, end in pairwise(accumulate(batch.lengths, initial=0)):
        own = (batch.predictors >= start) & (batch.predictors < end)
        yield Packed(
            input_ids=batch.input_ids[:, start:end],
            position_ids=batch.position_ids[:, start:end],
            predictors=batch.predictors[own] - start,
            targets=batch.targets[own],
            rows=batch.rows[own.cpu()],
            lengths=(end - start,),
        )


def split(examples: Iterable[Example], max_tokens: int) -> list[list[Example]]:
    """Divide conversations into micro-batches of at most `max_tokens` tokens, in order of length.

    First-fit decreasing: the longest first, each into the first micro-batch with room. A
    conversation longer than `max_tokens` stands alone: it is never cut here.
    """
    bins: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=_longest_first):
        for index, free in enumerate(room):
            if example.input_tokens <= free:
                bins[index].append(example)
                room[index] -= example.input_tokens
                break
        else:
            bins.append([example])
            room.append(max_tokens - example.input_tokens)
    return bins


def divide(
    examples: Sequence[Example], max_tokens: int, workers: int, uneven: float = UNEVEN
) -> list[list[list[Example]]]:
    """The micro-batches of each that work side by side, with about as many tokens for each.

    Where these differ too much fewer work, with more cores for each: one that is done early waits
    for the others. One alone has micro-batches as small as theirs would have been, so that it needs
    no more memory.

    Args:
        examples: the conversations of a step.
        max_tokens: in a micro-batch, as of `split`.
        workers: the most that work side by side.
        uneven: the most tokens of one, as a multiple of what all would have if divided evenly.
    """
    for sharing in range(workers, 1, -1):
        parts = _even_parts(examples, sharing)
        if max(map(input_tokens, parts)) * sharing <= uneven * input_tokens(examples):
            return [split(part, max_tokens) for part in parts]
    share = math.ceil(UNEVEN * input_tokens(examples) / workers)
    return [split(examples, min(max_tokens, share))]


def _even_parts(examples: Sequence[Example], count: int) -> list[list[Example]]:
    """Parts with about as many tokens each.

    The longest conversation first, each to the part with the fewest tokens. Then one of the fullest
    part is exchanged for one of another, or for none, for as long as that evens out the two.

    Source: Graham 1969, Bounds on Multiprocessing Timing Anomalies, for the first.
    """
    parts: list[list[Example]] = [[] for _ in range(count)]
    for example in sorted(examples, key=_longest_first):
        min(parts, key=input_tokens).append(example)
    while exchange := _best_exchange(parts):
        fullest, other, mine, theirs = exchange
        moved = [fullest.pop(mine)]
        fullest += [other.pop(theirs)] if theirs is not None else []
        other += moved
    return parts


def _best_exchange(
    parts: Sequence[list[Example]],
) -> tuple[list[Example], list[Example], int, int | None] | None:
    """What leaves the fullest part and another the least apart; None if all leave them further.

    Returns:
        Both parts, the place in the first, and that in the second, which is None for nothing.
    """
    fullest = max(parts, key=input_tokens)
    found = [
        (abs(gap - 2 * moved), fullest, other, mine, theirs)
        for other in parts
        if (gap := input_tokens(fullest) - input_tokens(other)) > 0
        for mine in range(len(fullest))
        for theirs in (None, *range(len(other)))
        if 0 < (moved := fullest[mine].input_tokens - _length(other, theirs)) < gap
    ]
    return min(found, key=lambda exchange: exchange[0])[1:] if found else None


def _length(examples: Sequence[Example], place: int | None) -> int:
    return 0 if place is None else examples[place].input_tokens


def _longest_first(example: Example) -> tuple[int, int]:
    return -example.input_tokens, example.row


def input_tokens(examples: Sequence[Example]) -> int:
    """How many tokens of these conversations go through a model."""
    return sum(example.input_tokens for example in examples)
