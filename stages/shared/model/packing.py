"""Packing: conversations end to end in one row, without padding or attention across them.

Positions restart with each conversation. From them transformers builds a mask that is causal inside
each conversation and closed between them (`find_packed_sequence_indices` in
`transformers.masking_utils`), unless an attention mask is given, even one of all ones.
`attention.py` uses `lengths` instead where it can.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from stages.shared.core.errors import UserError, reading

# Architectures that may pack, each tested, with a sliding window shorter than a conversation where
# it has one. Positions and lengths separate conversations in attention only: recurrent states
# (Mamba, linear attention), convolutions and custom masks would leak between them.
PACKING = frozenset(
    "apertus arcee bitnet cohere cohere2 ernie4_5 exaone4 gemma gemma3_text glm glm4 gpt2 "  # noqa: SIM905
    "gpt_bigcode gpt_neox granite hunyuan_v1_dense llama mistral mixtral nemotron olmo olmo2 olmo3 "
    "opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2".split()
)
# Rotary embeddings whose frequencies depend on the longest conversation in the row.
LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class Example:
    """A tokenized conversation."""

    input_ids: np.ndarray  # int64 [tokens]
    loss_mask: np.ndarray  # bool [tokens]
    row: int
    weights: np.ndarray | None = None  # of the loss, fp32 [tokens]; None: 1 where supervised

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def predictors(self) -> np.ndarray:
        """Positions before a supervised token: int64 [supervised]; the first token has none."""
        return np.flatnonzero(self.loss_mask[1:])

    @cached_property
    def supervised_tokens(self) -> int:
        """Tokens that the loss counts."""
        return len(self.predictors)

    @property
    def supervised_weights(self) -> np.ndarray:
        """Weights of the supervised tokens: fp32 [supervised]."""
        if self.weights is None:
            return np.ones(self.supervised_tokens, np.float32)
        return self.weights[1:][self.predictors]

    @cached_property
    def loss_weight(self) -> float:
        """Sum of the weights of supervised tokens."""
        return float(self.supervised_weights.sum(dtype=np.float64))

    @cached_property
    def input_tokens(self) -> int:
        """Tokens up to the last predictor, as the loss needs no others; all without a predictor."""
        return int(self.predictors[-1]) + 1 if len(self.predictors) else len(self)


MicroBatches = list[list[Example]]
# Predicts nothing: its loss and its gradient are 0.
IDLE = Example(np.zeros(2, np.int64), np.zeros(2, bool), row=0)


def read_examples(path: Path) -> list[Example]:
    """Read a split that `prepare` wrote."""
    examples = []
    with reading(path), path.open("rb") as file:
        stored, names = pq.ParquetFile(file), ("input_ids", "loss_mask", "weights")
        columns = [name for name in names if name in stored.schema_arrow.names]
        # In this thread: `read_table` waits for ever for one that a limit of memory denies it.
        table = stored.read(columns, use_threads=False)
        for row, (ids, mask, *weights) in enumerate(zip(*table.columns, strict=True)):
            example = Example(
                np.asarray(ids.values, dtype=np.int64),
                np.asarray(mask.values, dtype=bool),
                row,
                np.asarray(weights[0].values) if weights and weights[0].is_valid else None,
            )
            if not 0 < len(example) == len(example.loss_mask) or example.input_ids.min() < 0:
                raise ValueError(f"row {row} has no token, a negative one, or no mask to it")
            examples.append(example)
    return examples


def require_vocabulary(examples: Sequence[Example], size: int) -> None:
    """Raise a UserError if a token that occurs has no row in the embedding."""
    largest = max((int(e.input_ids.max()) for e in examples), default=0)
    if largest >= size:
        raise UserError(
            f"models/tokenizer: gives data/prepared token {largest}, but the model's embedding has "
            f"{size} rows. Use the model's own tokenizer."
        )


@dataclass(frozen=True)
class Packed:
    """A micro-batch: int64 tensors, on the device except for `rows`."""

    input_ids: torch.Tensor  # [1, tokens]
    position_ids: torch.Tensor  # [1, tokens], from 0 in each conversation
    predictors: torch.Tensor  # [supervised], positions whose logits predict a supervised token
    targets: torch.Tensor  # [supervised], the tokens they should predict
    weights: torch.Tensor  # [supervised], of the loss, fp32
    rows: torch.Tensor  # [supervised], of their conversations; on the host, where losses are summed
    lengths: tuple[int, ...]  # tokens of each conversation


def pack(examples: Sequence[Example], device: torch.device) -> Packed:
    """Concatenate conversations, each up to its `input_tokens`."""
    lengths = [e.input_tokens for e in examples]
    starts = accumulate(lengths[:-1], initial=0)
    ids = np.concatenate([e.input_ids[: e.input_tokens] for e in examples])
    positions = np.concatenate([np.arange(length) for length in lengths])
    predictors = np.concatenate([s + e.predictors for s, e in zip(starts, examples, strict=True)])
    targets = np.concatenate([e.input_ids[1:][e.predictors] for e in examples])
    rows = np.repeat([e.row for e in examples], [e.supervised_tokens for e in examples])
    weights = np.concatenate([e.supervised_weights for e in examples])
    return Packed(
        input_ids=to_device(ids, device)[None],
        position_ids=to_device(positions, device)[None],
        predictors=to_device(predictors, device),
        targets=to_device(targets, device),
        weights=to_device(weights, device),
        rows=torch.from_numpy(rows),
        lengths=tuple(lengths),
    )


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy to CUDA from pinned memory, asynchronously; on a CPU the tensor shares memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def packed_rows(config: Any, examples: Sequence[Example], device: torch.device) -> Iterator[Packed]:
    """A micro-batch in one row; in a row for each conversation where the model cannot pack."""
    for row in [examples] if may_pack(config) else [[one] for one in examples]:
        yield pack(row, device)


def may_pack(config: Any) -> bool:
    """Whether packed conversations stay separate in a model of this transformers config."""
    return config.model_type in PACKING and not has_length_dependent_rope(config)


def has_length_dependent_rope(config: Any) -> bool:
    """Whether rotary frequencies of any layer depend on the rest of the batch."""
    parameters = getattr(config, "rope_parameters", None) or {}  # for all layers, or per layer type
    every = (parameters, *(part for part in parameters.values() if isinstance(part, dict)))
    return any(part.get("rope_type") in LENGTH_DEPENDENT for part in every)


def bins(examples: Iterable[Example], max_tokens: int) -> MicroBatches:
    """Micro-batches by first-fit decreasing; a conversation beyond `max_tokens` gets its own."""
    batches: MicroBatches = []
    free: list[int] = []
    for example in sorted(examples, key=_longest_first):
        tokens = example.input_tokens
        index = next((i for i, left in enumerate(free) if tokens <= left), len(free))
        if index == len(free):
            batches.append([])
            free.append(max_tokens)
        batches[index].append(example)
        free[index] -= tokens
    return batches


def partition(examples: Sequence[Example], max_tokens: int, devices: int) -> list[MicroBatches]:
    """Micro-batches of each device, balanced by tokens: the longest first, to the emptiest.

    Source: Graham 1969, Bounds on Multiprocessing Timing Anomalies.
    """
    parts: list[list[Example]] = [[] for _ in range(devices)]
    for example in sorted(examples, key=_longest_first):
        min(parts, key=input_tokens).append(example)
    return [bins(part, max_tokens) for part in parts]


def even_passes(parts: Sequence[MicroBatches], packs: bool) -> list[MicroBatches]:
    """Give every device the same number of forward passes: those with fewer get `IDLE` ones.

    Each pass gathers sharded weights from all devices, and would wait for ever for one without.
    `packs`: a micro-batch is one pass; else each of its conversations is.
    """
    passes = [len(part) if packs else sum(map(len, part)) for part in parts]
    most = max(passes)
    return [[*part, *[[IDLE]] * (most - own)] for part, own in zip(parts, passes, strict=True)]


def _longest_first(example: Example) -> tuple[int, int]:
    return -example.input_tokens, example.row


def input_tokens(examples: Sequence[Example]) -> int:
    """Total input tokens."""
    return sum(example.input_tokens for example in examples)
