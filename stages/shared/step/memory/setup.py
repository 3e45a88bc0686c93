"""Training setup, micro-batches and workload, as far as memory depends on them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from stages.shared.core.errors import reading
from stages.shared.model import packing
from stages.shared.model.cpu_attention import MOST_QUERIES, length_groups
from stages.shared.model.packing import Example
from stages.shared.weights.precision import DENSE_BYTES

Device = Literal["cpu", "cuda"]
SWITCHED_OFF = "QLORA_FUSED is false"
DENSE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SCALES = {"alpha", "rslora"}  # keys of `lora` without a byte
MOST_COUNTED = 8  # micro-batches of a training; each takes a quarter of a second


@dataclass(frozen=True)
class TrainingSetup:
    """Parameters and settings of a training that its memory depends on."""

    precision: str  # of the linear layers
    lora: dict[str, Any] | None  # see `lora_of`; None for full fine-tuning
    double_quant: bool = False
    stored: str = "bf16"  # dtype of what is not quantized, in files
    compute: str = "bf16"  # dtype of matmuls; fp32 where the device lacks the stored one
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    device: Device = "cuda"
    fused: bool = True  # where fused functions cover the step
    masters: bool = True  # full fine-tuning keeps fp32 weights, as `train` does
    router_aux_loss: float | None = None  # as in `train`; None: as the config has it

    @property
    def rounds_masters(self) -> bool:
        """Whether fp32 masters hold more than the file that is made of them."""
        return self.lora is None and self.masters and self.stored != "fp32"


def lora_of(lora: Any) -> dict[str, Any]:
    """The keys of the section `lora` that memory depends on."""
    return {key: value for key, value in vars(lora).items() if key not in SCALES}


def setup_of(
    quantize: Any, lora: Any, train: Any, device: Device, *, bf16: bool = True, fused: bool = True
) -> TrainingSetup:
    """The setup that the sections `quantize` (or `Stored`), `lora` and `train` describe.

    `bf16`: whether the device has matmuls in it (`precision.has_bf16_matmuls`); `fused`:
    `QLORA_FUSED`.
    """
    dense = quantize.precision in DENSE_BYTES
    stored = quantize.precision if dense else quantize.compute_dtype
    has = {"fp16": device != "cpu", "bf16": bf16, "fp32": True}
    return TrainingSetup(
        quantize.precision,
        lora_of(lora) if train.method == "lora" else None,
        double_quant=quantize.double_quant and quantize.precision in ("fp4", "nf4"),
        stored=stored,
        compute=stored if has[stored] else "fp32",
        optimizer=train.optimizer,
        device=device,
        fused=fused,
        router_aux_loss=train.router_aux_loss,
    )


class Stored(NamedTuple):
    """Precision of a model's files, by the names of the section `quantize`."""

    precision: str
    double_quant: bool
    compute_dtype: str


def stored_as(config: Path) -> Stored:
    """Read the precision from a `config.json` that `quantize` wrote."""
    with reading(config):
        values = json.loads(config.read_bytes())
        dense = DENSE_NAMES[values.get("dtype") or values.get("torch_dtype") or "float32"]
        quantization = values.get("quantization_config") or {}
        if quantization.get("load_in_8bit"):
            return Stored("int8", False, dense)
        if not quantization.get("load_in_4bit"):
            return Stored(dense, False, dense)
        kind = {"nf4": "nf4", "fp4": "fp4"}[quantization["bnb_4bit_quant_type"]]
        return Stored(kind, bool(quantization["bnb_4bit_use_double_quant"]), dense)


@dataclass(frozen=True)
class MicroBatch:
    """Lengths and supervised tokens of conversations that go through the model at once.

    Order counts: attention pads neighbours of about one length together.
    """

    lengths: tuple[int, ...]
    supervised: int

    @property
    def tokens(self) -> int:
        """Tokens of all conversations."""
        return sum(self.lengths)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes that memory grows with: tokens, targets, padded tokens, scores, longest."""
        groups = [(len(group.lengths), group.length) for group in length_groups(self.lengths)]
        padded = max(count * length for count, length in groups)
        scores = max(count * length * min(length, MOST_QUERIES) for count, length in groups)
        return self.tokens, self.supervised, padded, scores, max(self.lengths)


def micro_batch_of(examples: Sequence[Example]) -> MicroBatch:
    """The sizes of conversations that are packed together."""
    supervised = sum(example.supervised_tokens for example in examples)
    return MicroBatch(tuple(example.input_tokens for example in examples), supervised)


def decisive(batches: Iterable[MicroBatch]) -> list[MicroBatch]:
    """At most `MOST_COUNTED` micro-batches that decide a training's peak.

    Memory is about linear in their sizes: of those that no other equals or exceeds in every size,
    the largest in each size, then those large in all. Of five trainings with 11 to 28 such ones,
    the peak of these eight was at most 0.24 % below that of all.
    """
    largest: list[MicroBatch] = []
    for batch in sorted(batches, key=lambda batch: batch.sizes, reverse=True):
        if not any(all(map(int.__ge__, larger.sizes, batch.sizes)) for larger in largest):
            largest.append(batch)
    most = [max(sizes) for sizes in zip(*(batch.sizes for batch in largest), strict=True)]

    def shares(batch: MicroBatch) -> float:
        return sum(size / top for size, top in zip(batch.sizes, most, strict=True) if size)

    extremes = (max(largest, key=lambda b: (b.sizes[i], shares(b))) for i in range(len(most)))
    ranked = dict.fromkeys([*extremes, *sorted(largest, key=shares, reverse=True)])
    return list(ranked)[:MOST_COUNTED]


@dataclass(frozen=True)
class Workload:
    """Conversations of each optimizer step, and their micro-batches of any number of tokens."""

    steps: Sequence[Sequence[Example]]  # those that repeat others may be left out
    _packed: dict[int, set[MicroBatch]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation, as it goes through the model."""
        return max(example.input_tokens for step in self.steps for example in step)

    def micro_batches(self, tokens: int) -> set[MicroBatch]:
        """Micro-batches of at most so many tokens; a longer conversation stands alone."""
        if tokens not in self._packed:
            self._packed[tokens] = {
                micro_batch_of(batch) for step in self.steps for batch in packing.bins(step, tokens)
            }
        return self._packed[tokens]

    def cut(self, length: int) -> "Workload":
        """The same with conversations of at most so many tokens, about as `prepare` cuts them."""
        return Workload(
            [
                [Example(x.input_ids[:length], x.loss_mask[:length], x.row) for x in step]
                for step in self.steps
            ]
        )


def workload_of_counts(longest: int, batch_size: int, supervised_share: float) -> Workload:
    """A step of `batch_size` conversations of the greatest length, where only counts are known."""
    mask = np.arange(longest + 1) > longest - max(1, round(longest * supervised_share))
    ids = np.zeros(longest + 1, dtype=np.int64)
    return Workload([[Example(ids, mask, row) for row in range(batch_size)]])
