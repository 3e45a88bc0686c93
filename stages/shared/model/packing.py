"""Conversations laid end to end in one row, with no padding and without seeing each other.

Positions restart with each conversation. Given these positions and no attention mask, transformers
builds an attention mask that is causal inside each conversation and closed between them
(`find_packed_sequence_indices` in `transformers.masking_utils`); an attention mask, even one of all
ones, would switch that off. `attention.py` goes by `lengths` where it can.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from stages.shared.core.errors import UserError

UNEVEN = 1.1  # the fullest part of a partition, at most, over an even one

# Architectures that may pack. A packed row keeps conversations apart by its positions and lengths:
# both concern attention alone. A state that runs along the row (Mamba, linear attention), a
# convolution, or a mask of a model's own making knows nothing of them, and would let each
# conversation see those before it. So each of these is tested, with a window shorter than a
# conversation where it has one; in any other, each conversation is computed by itself.
PACKING = frozenset(
    "apertus arcee bitnet cohere cohere2 ernie4_5 exaone4 gemma gemma3_text glm glm4 gpt2 "  # noqa: SIM905
    "gpt_bigcode gpt_neox granite hunyuan_v1_dense llama mistral mixtral nemotron olmo olmo2 olmo3 "
    "opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2".split()
)
# Rotary embeddings whose frequencies depend on the longest conversation of the row.
LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class Example:
    """One conversation: `input_ids` int64 [tokens], `loss_mask` bool [tokens], and its row."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    row: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def predictors(self) -> np.ndarray:
        """Positions before a supervised token: int64 [supervised]; the first token has none."""
        return np.flatnonzero(self.loss_mask[1:])

    @cached_property
    def supervised_tokens(self) -> int:
        """The number of its tokens that are predicted."""
        return len(self.predictors)

    @cached_property
    def input_tokens(self) -> int:
        """The number of its tokens that go through a model: those up to the last that predicts.

        Nothing supervised sees those after it. All where none is supervised.
        """
        return int(self.predictors[-1]) + 1 if len(self.predictors) else len(self)


def read_examples(path: Path) -> list[Example]:
    """All conversations of a split that `prepare` wrote, in order."""
    table = pq.read_table(path, columns=["input_ids", "loss_mask"])
    return [
        Example(np.asarray(ids.values, dtype=np.int64), np.asarray(mask.values, dtype=bool), row)
        for row, (ids, mask) in enumerate(zip(table["input_ids"], table["loss_mask"], strict=True))
    ]


def require_vocabulary(examples: Sequence[Example], size: int) -> None:
    """Refuse tokens beyond the rows of an embedding; a tokenizer may have more than occur.

    Raises:
        UserError: names the largest.
    """
    largest = max((int(e.input_ids.max()) for e in examples), default=0)
    if largest >= size:
        raise UserError(
            f"models/tokenizer: gives data/prepared token {largest}, but the model's embedding has "
            f"{size} rows. Put the model's own tokenizer beside it."
        )


@dataclass(frozen=True)
class Packed:
    """A micro-batch: all int64, on the device but for `rows`."""

    input_ids: torch.Tensor  # [1, tokens]
    position_ids: torch.Tensor  # [1, tokens], from 0 in each conversation
    predictors: torch.Tensor  # [supervised], positions whose logits predict a supervised token
    targets: torch.Tensor  # [supervised], the tokens they should predict
    rows: torch.Tensor  # [supervised], of their conversations; on the host, where losses are summed
    lengths: tuple[int, ...]  # of the conversations, in tokens


def pack(examples: Sequence[Example], device: torch.device) -> Packed:
    """Lay conversations end to end, each up to its `input_tokens`."""
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


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor, without waiting for the device; on a CPU they share memory.

    CUDA copies from pinned memory while the host goes on; for any other the host waits.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def unpack(batch: Packed) -> Iterator[Packed]:
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


def may_pack(config: Any) -> bool:
    """Whether conversations in one row of this model, a transformers config, stay separate."""
    return config.model_type in PACKING and not has_length_dependent_rope(config)


def has_length_dependent_rope(config: Any) -> bool:
    """Whether rotary frequencies of any layer depend on what else is in the batch."""
    parameters = getattr(config, "rope_parameters", None) or {}  # one, or one a kind of layer
    every = (parameters, *(part for part in parameters.values() if isinstance(part, dict)))
    return any(part.get("rope_type") in LENGTH_DEPENDENT for part in every)


def bins(examples: Iterable[Example], max_tokens: int) -> list[list[Example]]:
    """Micro-batches of at most `max_tokens` tokens, in order of length.

    First-fit decreasing: the longest first, each into the first micro-batch with room. A
    conversation longer than `max_tokens` stands alone: it is never cut here.
    """
    batches: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=_longest_first):
        for index, free in enumerate(room):
            if example.input_tokens <= free:
                batches[index].append(example)
                room[index] -= example.input_tokens
                break
        else:
            batches.append([example])
            room.append(max_tokens - example.input_tokens)
    return batches


def partition(
    examples: Sequence[Example], max_tokens: int, workers: int, uneven: float = UNEVEN
) -> list[list[list[Example]]]:
    """The micro-batches of at most so many workers, with about as many tokens for each.

    Where the fullest has more than `uneven` times an even share, fewer work, with more cores for
    each: one that is done early waits for the others. One alone has micro-batches as small as
    theirs would have been, so that it needs no more memory.
    """
    for count in range(workers, 1, -1):
        parts = _even_parts(examples, count)
        if max(map(input_tokens, parts)) * count <= uneven * input_tokens(examples):
            return [bins(part, max_tokens) for part in parts]
    share = math.ceil(UNEVEN * input_tokens(examples) / workers)
    return [bins(examples, min(max_tokens, share))]


def _even_parts(examples: Sequence[Example], count: int) -> list[list[Example]]:
    """The longest first, each to the part with the fewest tokens; then exchanges to even them out.

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
    """The fullest part, another, and an index in each (None: nothing back) that evens them most."""
    fullest = max(parts, key=input_tokens)
    exchanges = [
        (abs(gap - 2 * moved), fullest, other, mine, theirs)
        for other in parts
        if (gap := input_tokens(fullest) - input_tokens(other)) > 0
        for mine in range(len(fullest))
        for theirs in (None, *range(len(other)))
        if 0 < (moved := fullest[mine].input_tokens - _length(other, theirs)) < gap
    ]
    return min(exchanges, key=lambda exchange: exchange[0])[1:] if exchanges else None


def _length(examples: Sequence[Example], index: int | None) -> int:
    return 0 if index is None else examples[index].input_tokens


def _longest_first(example: Example) -> tuple[int, int]:
    return -example.input_tokens, example.row


def input_tokens(examples: Sequence[Example]) -> int:
    """The number of tokens of these conversations that go through a model."""
    return sum(example.input_tokens for example in examples)
